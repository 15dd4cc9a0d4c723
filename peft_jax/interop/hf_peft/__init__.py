"""HF PEFT's adapters, both ways: ``adapter_model.safetensors`` and ``adapter_config.json``.

    interop.hf_peft.save("adapter/", run.params)
    params, forward = interop.hf_peft.load("adapter/", model)

What becomes of our leaves (`save`), and of the format's options (`load`):

LoRA            ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]``, ours transposed; embeddings ``lora_embedding_A`` and
                ``_B``.  Each layer's own rank and scale are kept (``rank_pattern``, ``alpha_pattern``), padding is not.
                Several LoRA leaves on one weight are one of the summed rank, which is the same function.
DyLoRA          saved as the LoRA that it is at its rank in use: the largest, unless `methods.use_rank` set another.
DoRA            ``lora_magnitude_vector``.  An adapter has it everywhere or nowhere.
QA-LoRA         ``use_qalora``: ``lora_A`` ``[r, in/g]``.  HF PEFT's pooling multiplies by the number of groups, so a
                sum or a mean is saved under another scale: the same function.  All groups must be of one size.
PiSSA, OLoRA    saved as a plain LoRA of rank 2r, ``[A, A₀] [B; −B₀]``, that needs no other base.  HF PEFT's own files
                hold A and B alone: loading computes A₀ and B₀ again from the base, as HF PEFT does.
VeRA            ``vera_lambda_d`` and ``_b``; the pair is written too (``base_model.vera_A``, ``_B``) or left to the
                seed (``save_projection``).  A pair that is not its seed's is refused, unless `load` is told to take it.
AdaLoRA         ``lora_A``, ``lora_E`` and ``lora_B``: Q, λ and P, without their padding.  What `methods.prune` took is
                in ``rank_pattern``; what is only λ = 0 is written.  The scale is α/(r₀ + 1e-5) on both sides.
unfreeze        ``modules_to_save``, whole modules: a norm's bias comes with its scale.  Biases alone are the bias mode
                'all', or 'lora_only' with those of all adapted modules.
fused matrices  GPT-2's c_attn is three leaves here.  Saved, it is one pair of rank r_q + r_k + r_v, B in blocks, which
                loading takes apart again.  A pair without blocks is loaded as three with the same A and B sliced: they
                train apart; saved again before that, they are the pair that they were.
tied heads      one leaf here, whose adapter acts on the look-up and the head.  Saved, both halves are written, with
                ``ensure_weight_tying``, which keeps them tied in HF PEFT too.  An adapter of one half alone, or with
                DoRA, raises: untie the model.

experts         a module each, ``….experts.5.gate_proj.lora_A``, as before transformers 5 fused them: HF PEFT turns
                those into ``target_parameters`` as it loads them, if gate and up have one rank.  What it saves of them
                itself (``target_parameters``) is refused, as is all but LoRA on them, which it has not.
prompts         see `prompts`: one tensor.  A tree with a prompt and a LoRA is saved as two adapters.

A tree knows scales, not α nor the rate of dropout: α is the simplest number that gives the scale bit for bit, and the
rate is an argument of `save`.

A kind of adapter is a file here and a row of `loading.KINDS` (`kinds.Kind`).

Source: HF PEFT 0.21.2, utils/save_and_load.py, tuners/lora/{config,layer,model}.py.
"""

from peft_jax.interop.hf_peft.loading import load
from peft_jax.interop.hf_peft.saving import save

__all__ = ["load", "save"]
