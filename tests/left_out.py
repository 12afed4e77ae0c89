"""What `make test` leaves out of each tier and `make test-all` runs: the only place that says so.

A test is left out, or those of its parameters are for which the function beside it holds. The rule: each line of a
kernel runs in the tier that can see it go wrong, and what is left out runs the same lines at other sizes, in other
types or for other targets. `make test-faults` shows that the rest finds what the whole found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from adakd_kernels.divergences import DIVERGENCES, Divergence

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def every() -> bool:
    """The whole test."""
    return True


# One for each way in which the kernels sum a row: the two folds of their own, both KL divergences at once, two sweeps.
OF_EACH_CLASS = [DIVERGENCES[name]() for name in ("hellinger", "reverse_kl", "jeffreys", "jensen_shannon")]


def of_a_class_seen(divergence: Divergence | str) -> bool:
    """Whether another divergence stands for the way in which this one sums."""
    return divergence not in (*OF_EACH_CLASS, *(one.name for one in OF_EACH_CLASS))


# The interpreter takes a second for a few rows, whatever their length. fp16 and fp64 differ from bf16 and fp32 in the
# cast alone.
IN_THE_INTERPRETER: dict[str, Callable[..., bool]] = {
    "test_split.py::test_divergence_and_gradient": lambda divergence, parts: (
        parts != {"jensen_shannon": 3, "jeffreys": 2}.get(divergence.name, 7) or divergence.name in (
            "forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha_beta"
        )
    ),
    "test_split.py::test_rows_wherever_they_start": lambda divergence: divergence.sweeps == 1,
    "test_split.py::test_equal_rows_empty_rows_and_nan": lambda divergence: divergence.sweeps == 1,
    "test_contract.py::test_divergence_and_gradient_are_as_exact_as_eager": lambda divergence, dtype, vocab: (
        (dtype, vocab) not in ((FP32, 1003), (BF16, 4097)) if of_a_class_seen(divergence)
        else (dtype in (FP16, FP64) and vocab != 1003) or (dtype, vocab) in ((FP32, 7), (FP32, 50257), (BF16, 1003))
    ),
    "test_contract.py::test_equal_rows_give_zero_and_a_constant_changes_nothing": of_a_class_seen,
    "test_contract.py::test_gradcheck": of_a_class_seen,
    "test_contract.py::test_strided_views": lambda view, inplace: inplace and view != "padded rows",
    "test_contract.py::test_vocabularies_of_different_length": lambda divergence, student_vocab: (
        of_a_class_seen(divergence) or student_vocab == 2500
    ),
    "test_contract.py::test_minus_infinity_takes_an_entry_out": lambda divergence, vocab: (
        vocab != 7 and of_a_class_seen(divergence)
    ),
    "test_contract.py::test_nan_in_a_valid_row_is_seen": of_a_class_seen,
    "test_contract.py::test_large_finite_negative_logits_do_not_make_nan": of_a_class_seen,
    "test_contract.py::test_reruns_agree_bit_for_bit": of_a_class_seen,
    "test_contract.py::test_divergence_is_not_negative": of_a_class_seen,
    "test_contract.py::test_an_empty_row_is_an_ignored_token": of_a_class_seen,
    "test_gradient_at_once.py::test_the_operator_equals_the_pair": of_a_class_seen,
    "test_confident_rows.py::test_gradient_and_value_of_confident_tokens": lambda divergence, dtype: (
        dtype == FP16 or (dtype != FP32 and of_a_class_seen(divergence))
    ),
    "test_confident_rows.py::test_confident_tokens_of_a_short_vocabulary": lambda divergence, vocab: (
        vocab != 37 and of_a_class_seen(divergence)
    ),
    "test_extreme_rows.py::test_divergence_and_gradient": lambda divergence, dtype, family: (
        (dtype, family) != (FP32, "extreme") and of_a_class_seen(divergence)
    ),
    "test_extreme_rows.py::test_a_constant_that_rounds_nowhere_changes_nothing": lambda divergence: (
        divergence.name not in ("reverse_kl", "jensen_shannon")
    ),
    "test_extreme_rows.py::test_a_row_whose_value_is_nan_has_a_gradient_of_nan": of_a_class_seen,
    "test_losses.py::test_loss_and_gradient_equal_the_reference": lambda divergence, measure: (
        of_a_class_seen(divergence) or measure not in ("hellinger", "jensen_shannon")
    ),
    "test_losses.py::test_a_loss_of_nan_has_a_gradient_of_nan": lambda divergence, place: (
        of_a_class_seen(divergence) or (place == "teacher") != (divergence.name in ("reverse_kl", "jensen_shannon"))
    ),
    "test_alignment.py::test_rows_of_every_skew_between_rows_of_nan": lambda divergence, inplace: (
        inplace != (divergence == "reverse_kl")
    ),
    "test_linear.py::test_as_exact_as_the_logits_route": lambda share, dtype, options: (
        (dtype, bool(options), isinstance(share, float)) not in ((BF16, True, False), (FP32, False, True))
    ),
    "test_linear.py::test_head_that_is_a_module": lambda options, hidden_grad: (
        not hidden_grad or "ce_weight" not in options
    ),
    # The rows are the matter of test_contract.py.
    "test_linear.py::test_rows_that_are_empty_or_nan": every,
    "test_linear_divergence.py::test_as_exact_as_from_logits": lambda dtype, options: dtype != BF16 or not options,
    "test_linear_divergence.py::test_micro_batches_of_one_choice_add_up_to_the_batch": lambda ce_weight: not ce_weight,
    # What the ranks do with the kernels' numbers is plain torch; three ranks have one without a column.
    "test_vocab_parallel.py::test_rows_of_any_kind": lambda divergence, ranks, dtype: (
        (ranks, dtype) != (4, FP32) or of_a_class_seen(divergence) or divergence.name == "reverse_kl"
    ),
    "test_vocab_parallel.py::test_near_rows_and_missing_entries": lambda divergence, ranks: (
        ranks != 2 or of_a_class_seen(divergence)
    ),
    "test_vocab_parallel.py::test_loss_of_a_batch": lambda divergence, ranks, ce_weight: (
        ranks != 3 or not ce_weight or divergence.name != "jensen_shannon"
    ),
    "test_vocab_parallel.py::test_loss_from_hidden_states": every,
    "test_vocab_parallel.py::test_difficulty": every,
    "test_vocab_parallel.py::test_labels_of_no_entry_rows_of_nothing_and_no_valid_token": every,
    "test_vocab_parallel.py::test_nan_in_one_shard_is_loud_in_all": lambda divergence: divergence.name != "reverse_kl",
    "test_vocab_parallel.py::test_in_place_shifted_and_columns_beyond_the_vocabulary": every,
    "test_vocab_parallel.py::test_upstream_weights_and_a_choice": every,
    "test_vocab_parallel.py::test_modules_as_heads_and_the_sum_of_the_hidden_states_gradient": every,
    "test_token_terms.py::test_parts_of_a_row_and_their_sum": lambda divergence, dtype: (
        dtype == FP16 or (dtype != FP32 and of_a_class_seen(divergence))
    ),
    "test_token_terms.py::test_with_the_rows_own_numbers_it_is_the_forward_of_one_device": lambda divergence, dtype: (
        dtype != FP32 and of_a_class_seen(divergence)
    ),
    "test_token_terms.py::test_any_constant_and_any_entry_left_out": lambda dtype: dtype != FP32,
    # Which bytes are read and written depends on the sweeps of a divergence, not on its terms.
    "test_traffic.py::test_bytes_are_those_of_the_formula": lambda divergence, inplace, vocab: (
        of_a_class_seen(divergence) and (inplace or vocab != 4112)
    ),
    "test_traffic.py::test_nothing_outside_a_tensor_is_touched": lambda divergence, teacher_vocab: (
        of_a_class_seen(divergence) or (teacher_vocab == 1019 and divergence.name != "jeffreys")
    ),
    "test_extreme_rows.py::test_gradient_at_the_lowest_temperatures": of_a_class_seen,
    # What happens outside the kernels is the fast tier's matter.
    "test_losses.py::test_a_label_outside_the_common_vocabulary_is_loud": lambda label, inplace: (
        (label, inplace) not in ((1000, False), (301, True), (-1, False))
    ),
    "test_losses.py::test_labels_of_every_integer_type": lambda dtype: dtype != torch.uint8,
    "test_losses.py::test_micro_batches_add_up_to_the_batch": lambda as_tensor, ce_weight: (
        not (as_tensor and ce_weight)
    ),
    "test_losses.py::test_temperature_0_and_infinity_give_the_limit": lambda dtype: dtype == FP64,
    "test_losses.py::test_a_teacher_run_in_inference_mode": every,
    "test_losses.py::test_token_difficulty": lambda measure: measure not in ("hellinger", "jensen_shannon"),
    "test_gpu.py::test_nothing_waits_for_the_device": lambda options, num_items: bool(options) != (num_items is None),
    "test_gpu.py::test_peak_memory_is_the_gradient_and_numbers_per_token": lambda inplace: not inplace,
    # The schema and the fake results of an operator are the same for all of its kernels. One compiled model is left.
    "test_ops.py::test_opcheck": every,
    "test_token_terms.py::test_opcheck": every,
    "test_ops.py::test_compile_gives_the_eager_result_without_recompiling": every,
    "test_gpu.py::test_compiled_with_fullgraph_equals_eager": every,
    # The code that is compiled for such offsets runs in test_ptx.py.
    "test_gpu.py::test_more_than_two_to_the_31_entries": every,
    "test_gpu.py::test_a_graph_of_forward_and_backward_replays": lambda divergence: divergence != "reverse_kl",
    "test_gpu.py::test_reruns_are_equal_bit_for_bit": lambda divergence: divergence != "jensen_shannon",
}  # fmt: skip

# bf16, the type of training, is compiled for every target; the others for one of each family. For NVIDIA that is
# sm_100, the first to spill in fp64; the odd vocabulary takes sm_90, for which the resident warps are counted.
BUT_SM_90 = ("sm_80", "sm_100")
BUT_SM_100 = ("sm_80", "sm_90")
COMPILED: dict[str, Callable[..., bool]] = {
    "test_compile.py::test_rows_that_are_split_compile_clean": lambda divergence, vocab, target: (
        vocab == (151_936 if target in ("sm_90", "sm_80") else 50_257) or divergence == "jeffreys"
    ),
    "test_compile.py::test_kernel_compiles_clean": lambda kernel, target, student_dtype, teacher_dtype, divergence: (
        (target in BUT_SM_100 and (student_dtype, teacher_dtype) != (BF16, BF16))
        or (student_dtype != teacher_dtype and of_a_class_seen(divergence))
        # The other divergences of a class: bf16 for sm_90 and AMD's target, the other types for sm_100.
        or (of_a_class_seen(divergence) and (student_dtype == BF16) == (target in BUT_SM_90))
        # The odd vocabulary has the terms of all of them, and the forward has them beside more.
        or (kernel == "terms" and of_a_class_seen(divergence))
    ),
    "test_compile.py::test_odd_vocabulary_compiles_clean": lambda target, divergence: (
        target in BUT_SM_90 or (target == "gfx942" and of_a_class_seen(divergence))
    ),
    "test_compile.py::test_rows_that_do_not_start_alike_compile_clean": lambda kernel, target, divergence: (
        (target, kernel, divergence) != ("gfx942", "forward", "reverse_kl")
        and (target != "sm_90" or (kernel, divergence) not in (
            ("stats", "hellinger"), ("kl", "jeffreys"), ("forward", "reverse_kl"), ("forward", "jensen_shannon"),
            ("backward", "reverse_kl"), ("backward_ce", "jensen_shannon"), ("terms", "jensen_shannon"),
        ))
    ),
    "test_compile.py::test_rows_that_cannot_be_read_wide_are_read_together": lambda kernel, target, teacher: (
        (target, kernel) != ("sm_90", "forward") or teacher.shape[-1] == 50257
    ),
    "test_compile.py::test_views_that_start_alike_are_read_wide": lambda kernel, divergence, target, vocab: (
        (target, vocab) != ("sm_90", 151669)
        or (kernel, divergence) not in (("stats", "hellinger"), ("forward", "reverse_kl"), ("backward", "reverse_kl"))
    ),
    "test_compile.py::test_views_that_start_alike_take_no_more_than_whole_rows": lambda divergence, target: (
        of_a_class_seen(divergence) or (target, divergence) == ("sm_100", "hellinger")
    ),
    "test_compile.py::test_other_vocabularies_compile_clean": lambda target, vocab: (
        target in BUT_SM_100 or (target, vocab) == ("gfx942", 50257)
    ),
    "test_compile.py::test_padded_student_compiles_clean": lambda target: target in BUT_SM_100,
    "test_compile.py::test_every_vocabulary_and_padding_is_read_wide": lambda target: target != "sm_90",
    # The loops are those of the forward and of the backward, which are compiled above.
    "test_compile.py::test_divergence_and_gradient_at_once_compile_clean": lambda kernel, target, divergence, rows: (
        of_a_class_seen(divergence) or (target, kernel, rows) not in (
            ("sm_80", "with_gradient_ce", "whole"), ("sm_90", "with_gradient_ce", "odd"),
            ("sm_100", "with_gradient_ce", "whole"), ("gfx942", "with_gradient_ce", "whole"),
        ) or divergence not in ("reverse_kl", "jensen_shannon")
    ),
    "test_compile.py::test_small_kernels_compile_clean_and_for_every_batch": lambda target, acc: (
        (target, acc) not in (("sm_90", torch.float32), ("gfx942", torch.float32), ("sm_90", torch.float64))
    ),
    "test_compile.py::test_helper_sees_a_spill": lambda target: target != "sm_90",
    "test_compile.py::test_batch_does_not_recompile": lambda target, vocab, divergence: (
        target == "gfx942" and (vocab == 50257 or divergence == "skew_reverse_kl")
    ),
    # What a divergence computes is the interpreter's matter; the compiler takes each class another way.
    "test_ptx.py::test_divergence_and_gradient_are_the_reference": lambda divergence, vocab: (
        of_a_class_seen(divergence) or (vocab != 8209 and divergence.name != "reverse_kl")
    ),
    "test_ptx.py::test_backward_with_cross_entropy_in_place_is_the_reference": lambda divergence, vocab: (
        of_a_class_seen(divergence) or (vocab != 8209 and divergence.name != "reverse_kl")
    ),
    "test_ptx.py::test_divergence_and_gradient_at_once_are_the_reference": lambda divergence, vocab, inplace: (
        of_a_class_seen(divergence) or (vocab, inplace) != (8209, True)
        or divergence.name not in ("reverse_kl", "jensen_shannon")
    ),
    "test_ptx.py::test_rows_beyond_two_to_the_31_entries_are_found": lambda dtype: dtype != BF16,
    # The test before finds such an offset in the real kernels.
    "test_ptx.py::test_out_of_bounds_and_int32_overflow_are_found": lambda fault: fault == "int32",
    "test_ptx.py::test_each_missing_barrier_is_a_race": lambda divergence: divergence != "reverse_kl",
}  # fmt: skip

# What reads nothing that the instruction set changes: `make test` runs it with the widest one alone. The rest runs with
# each, one divergence of a class standing for the others where the rows, not the divergence, are what is tested.
WITH_ANOTHER_INSTRUCTION_SET: dict[str, Callable[..., bool]] = {
    "test_contract.py::test_strided_views": every,
    "test_contract.py::test_offsets_beyond_31_bits": every,
    "test_contract.py::test_reruns_agree_bit_for_bit": every,
    "test_contract.py::test_gradcheck": every,
    "test_contract.py::test_vocabularies_of_different_length": of_a_class_seen,
    "test_contract.py::test_an_empty_row_is_an_ignored_token": of_a_class_seen,
    "test_contract.py::test_divergence_and_gradient_are_as_exact_as_eager": lambda divergence, dtype, vocab: (
        of_a_class_seen(divergence) and (dtype not in (BF16, FP32) or vocab not in (1003, 4097))
    ),
    "test_confident_rows.py::test_gradient_and_value_of_confident_tokens": lambda divergence, dtype: (
        of_a_class_seen(divergence) and dtype != FP32
    ),
    "test_confident_rows.py::test_confident_tokens_of_a_long_vocabulary": of_a_class_seen,
    "test_extreme_rows.py::test_divergence_and_gradient": lambda divergence, dtype: (
        of_a_class_seen(divergence) and dtype != FP32
    ),
    "test_token_terms.py::test_any_constant_and_any_entry_left_out": lambda dtype: dtype != FP32,
    "test_token_terms.py::test_opcheck": every,
    "test_native.py::test_threads_do_not_change_a_bit": every,
    "test_native.py::test_where_a_row_lies_in_memory_does_not_change_a_bit": of_a_class_seen,
    "test_native.py::test_memory_beside_logits_and_gradient_is_small": every,
    "test_native.py::test_the_environment_decides": every,
    "test_install.py::test_a_library_that_cannot_be_used_leaves_plain_torch_and_one_warning": every,
    "test_install.py::test_a_wrong_instruction_set_where_the_kernels_are_demanded_is_an_error_after_the_import": every,
    "test_scale.py::test_memory_from_logits": every,
    "test_scale.py::test_memory_of_what_is_merged": every,
    "test_scale.py::test_memory_from_hidden_states": every,
    "test_native.py::test_without_a_compiler_the_package_still_builds_and_says_so": every,
    "test_doctor.py::test_a_gradient_that_is_not_written_does_not_pass": every,
    "test_doctor.py::test_every_divergence_is_checked": every,
    "test_doctor.py::test_a_truth_of_zeros_proves_nothing": every,
    "test_doctor.py::test_a_check_leaves_the_process_as_it_was": every,
    "test_ops.py::test_opcheck": every,
    "test_ops.py::test_compile_gives_the_eager_result_without_recompiling": every,
    "test_ops.py::test_compile_of_a_model_with_inplace_and_the_module": every,
    "test_token_kl.py::test_strides": every,
    "test_token_kl.py::test_reruns_agree_bit_for_bit": every,
    "test_token_kl.py::test_masked_tokens_are_not_read": every,
    "test_token_kl.py::test_opcheck": every,
    "test_losses.py::test_labels_of_every_integer_type": every,
    "test_losses.py::test_micro_batches_add_up_to_the_batch": every,
    "test_losses.py::test_shift_takes_labels_aligned_with_the_inputs": every,
    "test_losses.py::test_module_drives_its_focus_by_the_distillation_loss": every,
    "test_losses.py::test_module_equals_the_function_and_resumes": every,
    "test_vocab_parallel.py::test_rows_of_any_kind": lambda divergence, ranks, dtype: (
        (ranks, dtype) != (4, FP32) or of_a_class_seen(divergence)
    ),
    "test_vocab_parallel.py::test_near_rows_and_missing_entries": every,
    "test_vocab_parallel.py::test_loss_of_a_batch": lambda ranks, ce_weight: ranks != 3 or not ce_weight,
    "test_vocab_parallel.py::test_loss_from_hidden_states": every,
}

WITH_THE_WIDEST_INSTRUCTION_SET: dict[str, Callable[..., bool]] = {
    # Plain torch, which the fast tier runs.
    "test_confident_rows.py::test_the_truth_is_the_derivative_of_the_definition": every,
    "test_confident_rows.py::test_every_divergence_has_a_definition": every,
    "test_ops.py::test_opcheck": lambda dtype: dtype == FP32,
    "test_vocab_parallel.py::test_rows_of_any_kind": lambda divergence, ranks, dtype: (
        (ranks, dtype) not in ((4, FP32), (2, BF16)) or (dtype == BF16 and of_a_class_seen(divergence))
    ),
    "test_vocab_parallel.py::test_near_rows_and_missing_entries": lambda ranks: ranks != 3,
    "test_vocab_parallel.py::test_loss_of_a_batch": lambda ranks, ce_weight: (ranks == 3) != bool(ce_weight),
    "test_vocab_parallel.py::test_loss_from_hidden_states": lambda ranks, options: (
        ranks != (4 if "keep_bytes" in options else 3)
    ),
    # Each builds a copy of the project; one build is enough to see that a tenth divergence can be added.
    "test_tenth_divergence.py::test_a_row_that_a_native_kernel_does_not_write_is_seen": every,
    "test_tenth_divergence.py::test_what_the_native_kernels_lack_does_not_compile": lambda omitted: omitted != "class",
}
WITH_ANOTHER_INSTRUCTION_SET = WITH_THE_WIDEST_INSTRUCTION_SET | WITH_ANOTHER_INSTRUCTION_SET

# Plain torch has no kernels of its own for a type or a divergence, and what a trainer does with a batch does not depend
# on the architecture or, beside one case, on the route.
IN_PLAIN_TORCH: dict[str, Callable[..., bool]] = {
    "test_confident_rows.py::test_gradient_and_value_of_confident_tokens": lambda divergence, dtype: (
        dtype == FP16 and of_a_class_seen(divergence)
    ),
    "test_ops.py::test_compile_gives_the_eager_result_without_recompiling": lambda ce_weight: not ce_weight,
    "test_trainer.py::test_step_equals_reference": lambda architecture, keep: (
        architecture == "llama" or (architecture == "gpt2" and keep == "per batch")
    ),
    "test_trainer_routes.py::test_first_steps_are_equal": lambda architecture: (
        architecture not in ("llama", "gemma2", "gpt2")
    ),
    "test_trainer_inputs.py::test_packed_records_do_not_see_each_other": lambda architecture, masked, route: (
        masked != (architecture == "gpt2") or (architecture == "gpt2" and route == "hidden")
    ),
    "test_trainer_inputs.py::test_padding_on_the_left_changes_nothing": lambda architecture, route: (
        (architecture, route) not in (("gpt2", "hidden"), ("llama", "logits"))
    ),
    "test_packing.py::test_rows_of_several_records_give_the_same_step": lambda architecture, route: (
        (architecture, route) not in (("gpt2", "logits"), ("llama", "hidden"))
    ),
    "test_trainer_adapters.py::test_own_base_teaches_as_a_copy_would": lambda kind: kind in ("trained tokens", "ia3"),
    "test_planted_faults.py::test_what_a_test_sees_is_found_and_the_rest_is_missed": every,
    "test_ops.py::test_opcheck": lambda dtype: dtype == FP32,
    "test_vocab_parallel.py::test_rows_of_any_kind": lambda divergence, ranks, dtype: (
        (ranks, dtype) not in ((4, FP32), (2, BF16)) or (dtype == BF16 and of_a_class_seen(divergence))
    ),
    "test_vocab_parallel.py::test_near_rows_and_missing_entries": lambda ranks: ranks != 3,
    "test_vocab_parallel.py::test_loss_of_a_batch": lambda ranks, ce_weight: (ranks == 3) != bool(ce_weight),
    "test_vocab_parallel.py::test_loss_from_hidden_states": lambda ranks, options: (
        ranks != (4 if "keep_bytes" in options else 3)
    ),
    "test_token_terms.py::test_parts_of_a_row_and_their_sum": lambda dtype: dtype == FP16,
    "test_token_terms.py::test_any_constant_and_any_entry_left_out": lambda dtype: dtype != FP32,
    "test_token_terms.py::test_opcheck": of_a_class_seen,
    "test_tenth_divergence.py::test_the_triton_kernels_do_not_compile_without_a_branch": every,
    "test_tenth_divergence.py::test_the_triton_kernels_compute_it": every,
    "test_documentation.py::test_a_measurement_in_the_docs_gives_what_they_show": lambda environment: (
        "TRITON_INTERPRET" in environment
    ),
    "test_step_selection.py::test_micro_batches_give_the_gradient_of_one_batch": lambda ce_weight, route: (
        (route == "hidden") != bool(ce_weight)
    ),
    "test_trl.py::test_without_adakd_the_losses_are_those_of_trl": lambda architecture: architecture == "granite",
    # Ranks of data-parallel runs are tested below the command line, and without these lines around them.
    "test_examples.py::test_the_trainer_on_two_processes": every,
    "test_tensor_parallel.py::test_adakd_train_on_two_ranks_gives_what_one_process_gives": lambda kind: kind == "data",
    "test_trainer_nan.py::test_the_run_stops_and_says_where": lambda selection, per_record, route: (
        (selection == "step") != (per_record == (route == "hidden"))
    ),
    "test_tenth_divergence.py::test_a_place_left_out_is_reported": lambda place: place not in ("class", "C++ list"),
}
