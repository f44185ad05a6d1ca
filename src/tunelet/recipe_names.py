"""What other tools call our recipe keys, so that an unknown key is answered with the right one.

Names only: the keys themselves and their meaning are in `recipe.py`. Loading is in `recipe_io.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

# The name somebody may bring from another tool (lower case, '-' as '_') -> our dotted key.
SYNONYMS: dict[str, str] = {
    # model
    "model": "model.path",
    "base_model": "model.path",
    "model_id": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "checkpoint": "model.path",
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "num_threads": "model.threads",
    "template": "model.chat_template",
    "chat_template_path": "model.chat_template",
    "config": "model.architecture",
    # data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "data": "data.train",
    "eval_dataset": "data.eval",
    "validation_file": "data.eval",
    "val_data": "data.eval",
    "test_size": "data.eval_fraction",
    "val_set_size": "data.eval_fraction",
    "validation_split": "data.eval_fraction",
    "max_samples": "data.limit",
    "max_train_samples": "data.limit",
    "dataset_format": "data.format",
    "column_mapping": "data.columns",
    "system_prompt": "data.system",
    "default_system": "data.system",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "seq_length": "data.max_length",
    "seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "block_size": "data.max_length",
    # model
    "quantize": "model.quantization",
    "quantization_bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "load_in_4bit": "model.quantization",
    # train
    "lr": "train.learning_rate",
    "learningrate": "train.learning_rate",
    "bs": "train.batch_size",
    "batchsize": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "grad_accum": "train.gradient_accumulation",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "grad_accumulation": "train.gradient_accumulation",
    "accumulate_grad_batches": "train.gradient_accumulation",
    "max_tokens_per_batch": "train.tokens_per_batch",
    "micro_batch_tokens": "train.tokens_per_batch",
    "activation_checkpointing": "train.gradient_checkpointing",
    "grad_checkpoint": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "optim": "train.optimizer_state",
    "optim_bits": "train.optimizer_state",
    "torch_compile": "train.compile",
    "fsdp": "train.parallel",
    "ddp": "train.parallel",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "iters": "train.max_steps",
    "max_iters": "train.max_steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "epoch": "train.epochs",
    "scheduler": "train.schedule",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "lr_schedule": "train.schedule",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "num_warmup_steps": "train.warmup",
    "min_lr": "train.min_lr_ratio",
    "wd": "train.weight_decay",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "clip": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "random_seed": "train.seed",
    "logging_steps": "train.log_steps",
    "log_every": "train.log_steps",
    "log_interval": "train.log_steps",
    "evaluation_steps": "train.eval_steps",
    "eval_interval": "train.eval_steps",
    "steps_per_eval": "train.eval_steps",
    "save_every": "train.save_steps",
    "save_interval": "train.save_steps",
    "checkpoint_steps": "train.save_steps",
    "save_total_limit": "train.keep_checkpoints",
    "early_stopping_patience": "train.early_stopping",
    "patience": "train.early_stopping",
    # adapter
    "lora": "adapter.kind",
    "peft": "adapter.kind",
    "use_peft": "adapter.kind",
    "finetuning_type": "adapter.kind",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "lora_target": "adapter.target_modules",
    # eval
    "max_new_token": "eval.max_new_tokens",
    "max_tokens": "eval.max_new_tokens",
    "per_device_eval_batch_size": "eval.batch_size",
    "eval_batch_size": "eval.batch_size",
    # the rest
    "run_name": "name",
    # method
    "task": "method.name",
    "stage": "method.name",
    "training_type": "method.name",
    "loss": "method.loss_type",
    "pref_loss": "method.loss_type",
    "dpo_beta": "method.beta",
    "pref_beta": "method.beta",
    "orpo_beta": "method.beta",
    "orpo_alpha": "method.beta",
    "kto_beta": "method.beta",
    "rpo": "method.rpo_alpha",
    "pref_ftx": "method.rpo_alpha",
    "dpo_label_smoothing": "method.label_smoothing",
    "gamma": "method.simpo_gamma",
    "gamma_beta_ratio": "method.simpo_gamma",
    "kto_chosen_weight": "method.desirable_weight",
    "kto_rejected_weight": "method.undesirable_weight",
}

# Switches of other tools that have no key here, and why not.
ABSENT: dict[str, str] = {
    "packing": "rows are always laid one after the other without padding, and attention never crosses a row's border",
    "assistant_only_loss": "only the assistant's turns are trained; give a turn `weight: 0` to leave it out",
    "completion_only_loss": "only the answer is trained; give a turn `weight: 0` to leave it out",
    "train_on_inputs": "only the assistant's turns are trained; use method = 'pretrain' for plain text",
    "report_to": "every run writes log.jsonl and report.html; nothing is sent anywhere",
    "ref_model": "the reference is the model the training starts from",
    "reference_model": "the reference is the model the training starts from",
    "precompute_ref_log_probs": "the reference's log-probabilities are always computed once, and kept on disk",
    "max_prompt_length": "data.max_length bounds prompt and answer together",
    "push_to_hub": "nothing leaves the machine; the model is in the run's folder",
    "hub_model_id": "nothing leaves the machine; the model is in the run's folder",
    "fp16": "set model.dtype",
    "bf16": "set model.dtype",
    "optimizer": "the optimizer is AdamW; train.optimizer_state says what its state is kept in",
    "output_dir": "the folder is the command's --out",
    "out": "the folder is the command's --out",
    "resume_from_checkpoint": "the same command goes on with its unfinished run, or: tunelet train --resume DIR",
}


def suggest(key: str, known: Collection[str]) -> str:
    """' Did you mean X?' or ' (why there is no such key)' for an unknown dotted key; '' where nothing is near.

    Order: the same last part in another section, a slip within the section, another tool's name for it, spelling.
    """
    section, _, leaf = key.lower().replace("-", "_").rpartition(".")
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)

    def here_first(names: Collection[str]) -> str:
        return min(names, key=lambda name: (name.rpartition(".")[0] != section, list(known).index(name)))

    if leaf in leaves:
        return f" Did you mean '{here_first(leaves[leaf])}'?"
    own = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    if section and (near := difflib.get_close_matches(leaf, own, n=1, cutoff=0.85)):
        return f" Did you mean '{section}.{near[0]}'?"
    if leaf in SYNONYMS and SYNONYMS[leaf] in known:
        return f" Did you mean '{SYNONYMS[leaf]}'?"
    if leaf in ABSENT:
        return f" There is no such key: {ABSENT[leaf]}."
    sections = sorted({name.partition(".")[0] for name in known if "." in name})
    near = difflib.get_close_matches(leaf, sections, n=1, cutoff=0.7)
    if near and not section:
        return f" Did you mean the section '{near[0]}'?"
    for pool in (own, list(leaves)):
        near = difflib.get_close_matches(leaf, pool, n=1, cutoff=0.6)
        if near:
            return f" Did you mean '{here_first(leaves[near[0]])}'?"
    near = difflib.get_close_matches(leaf, SYNONYMS, n=1, cutoff=0.8)
    if near and SYNONYMS[near[0]] in known:
        return f" Did you mean '{SYNONYMS[near[0]]}'?"
    near = difflib.get_close_matches(section or leaf, sections, n=1, cutoff=0.6)
    return f" Did you mean the section '{near[0]}'?" if near and near[0] != section else ""
