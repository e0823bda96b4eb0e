"""What was meant by a name that is no setting: one of Hugging Face's Trainer, TRL, LitGPT, nanoGPT or plain Lightning,
by its last part, or a misspelt one."""

import difflib

from salt_lightning.command.settings import REFUSED, in_brief

_EPOCHS = (
    "--trainer.max_steps: tokens / (--data.block_size x --data.global_batch_size); check counts the tokens of the text"
)
_BATCH = (
    "--data.global_batch_size, of all devices together, and --data.micro_batch_size, of one device; accumulation "
    "follows from both"
)
_OBJECTIVE = (
    "the KD loss is the forward KL over the whole vocabulary, on the text; docs/alternatives.md says who has others"
)
_PACKED = "text is always packed, and --data.isolate_documents keeps documents apart"
_STUDENT = "--model.student.path, or --model.student.family and .config for fresh weights"

_CALLED: dict[str, tuple[str, ...]] = {
    "--model.optim.lr": ("learning_rate", "max_lr", "peak_lr"),
    "--model.optim.weight_decay": ("wd",),
    "--model.optim.beta1 and --model.optim.beta2": ("adam_beta1", "adam_beta2", "betas", "adam_betas"),
    "--model.optim.eps": ("adam_epsilon", "adam_eps", "epsilon"),
    "--model.optim.schedule": ("lr_scheduler_type", "lr_scheduler", "lr_schedule", "scheduler"),
    "--model.optim.warmup_steps, for a ratio times --trainer.max_steps": (
        "warmup_ratio", "warmup_steps", "warmup_iters", "lr_warmup_steps", "num_warmup_steps",
    ),
    "--model.optim.min_lr_ratio, the lowest rate / --model.optim.lr": (
        "min_lr", "min_learning_rate", "lr_end", "min_lr_rate",
    ),
    "--trainer.gradient_clip_val": ("max_grad_norm", "grad_clip", "clip_grad", "max_norm", "clip_grad_norm"),
    _BATCH: (
        "gradient_accumulation_steps", "grad_accum_steps", "gradient_accumulation_iters", "accumulate_grad_batches",
        "per_device_train_batch_size", "train_batch_size", "batch_size", "per_device_eval_batch_size",
    ),
    "--data.block_size": (
        "max_length", "max_seq_length", "max_seq_len", "seq_length", "seq_len", "sequence_length", "sequence_len",
        "context_length", "cutoff_len",
    ),
    _PACKED: ("packing", "sample_packing", "packed", "padding", "padding_side", "packing_strategy"),
    _EPOCHS: ("num_train_epochs", "num_epochs", "epochs", "max_epochs", "max_tokens", "train_tokens", "total_tokens"),
    "--trainer.max_steps": ("max_iters", "total_steps", "train_steps", "num_steps", "max_train_steps"),
    "--trainer.precision bf16-mixed": (
        "bf16", "fp16", "mixed_precision", "torch_dtype", "dtype", "precision", "bf16_full_eval",
    ),
    "--run": ("output_dir", "out_dir", "save_dir", "default_root_dir", "run_name", "logging_dir", "log_dir"),
    "--ckpt_path last": ("resume_from_checkpoint", "resume", "resume_from", "auto_resume"),
    "--checkpoint.every_n_steps": ("save_steps", "save_interval", "save_strategy", "save_every"),
    "--checkpoint.keep": ("save_total_limit", "keep_last", "save_top_k", "keep_checkpoints"),
    "--trainer.val_check_interval": (
        "eval_steps", "eval_interval", "eval_strategy", "evaluation_strategy", "eval_every", "eval_freq",
    ),
    "--trainer.log_every_n_steps": ("logging_steps", "log_interval", "log_every"),
    "--trainer.logger, e.g. WandbLogger, beside TensorBoard": (
        "report_to", "wandb", "use_wandb", "wandb_project", "logger_name", "wandb_log",
    ),
    "the verb export writes a folder that any uploader takes": ("push_to_hub", "hub_model_id", "hub_token"),
    "--seed_everything": ("seed", "random_seed"),
    "--data.seed": ("data_seed", "shuffle_seed"),
    _STUDENT: (
        "model_name_or_path", "model_name", "base_model", "student_model_name_or_path", "student_model",
        "checkpoint_dir", "initial_checkpoint_dir", "config_name", "model_path", "init_from",
    ),
    "--model.teacher.path": (
        "teacher_model_name_or_path", "teacher_model", "teacher_model_path", "teacher_name", "teacher_path",
    ),
    "--data.source": (
        "dataset_name", "dataset", "datasets", "dataset_path", "train_file", "train_data", "train_data_path",
        "data_path", "data_dir", "train_files",
    ),
    "--data.subset": ("dataset_config", "dataset_config_name", "dataset_subset"),
    "--data.split": ("dataset_train_split", "dataset_split"),
    "--data.val_source": ("validation_file", "val_file", "eval_dataset", "val_data", "val_data_path", "eval_file"),
    "--data.text_column": ("dataset_text_field", "text_field", "text_key", "content_key"),
    "--data.tokenizer": ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path", "tokenizer_dir"),
    "--data.num_workers": ("dataloader_num_workers",),
    "--data.prepare_workers": ("dataset_num_proc", "num_proc", "preprocessing_num_workers"),
    "--model.activation_checkpointing": ("gradient_checkpointing", "use_gradient_checkpointing"),
    "--model.compile": ("torch_compile", "use_compile"),
    "--trainer.strategy ddp, or --config configs/fsdp.yaml": ("deepspeed", "fsdp", "fsdp_config", "zero_stage", "ddp"),
    "--trainer.devices": ("num_gpus", "nproc_per_node", "gpus", "n_gpus"),
    "--kd.weight": ("kd_ratio", "kd_weight", "kd_alpha", "distill_alpha", "alpha", "distillation_weight"),
    "--model.teacher_temperature": ("temperature", "kd_temperature", "distill_temperature", "kd_temp", "tau"),
    _OBJECTIVE: (
        "lmbda", "beta", "loss_type", "loss", "kd_loss", "loss_fn", "reverse_kl", "divergence", "seq_kd",
        "loss_top_k", "num_generations", "hidden_loss",
    ),
}  # fmt: skip
_INSTEAD = {name: f"use {ours}" if ours.startswith("-") else ours for ours, names in _CALLED.items() for name in names}
# The same of settings that both models have.
_OF_A_MODEL = {
    "path": ("model_name_or_path", "model_name", "base_model", "model_path", "name", "name_or_path", "model"),
    "revision": ("model_revision", "revision"),
    "dtype": ("torch_dtype", "dtype"),
    "attention": ("attn_implementation", "use_flash_attention", "flash_attention", "flash_attn"),
    "trust_remote_code": ("trust_remote_code",),
}
# Sizes of a model, by the names that the configs of all families take.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), "hidden_size"),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), "num_hidden_layers"),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), "num_attention_heads"),
    **{name: name for name in ("intermediate_size", "num_key_value_heads")},
}
_PART = {name: ours for ours, names in _OF_A_MODEL.items() for name in names}
_OF_BOTH = {"trust_remote_code", "model_revision", *_OF_A_MODEL["attention"]}


def no_such(name: str, known: list[str], prefix: str = "") -> str:
    """The error about `name`, which is none of the known settings; `prefix`: of the class whose settings they are."""
    said = f"--{prefix}{name}: there is no such setting"
    others = [each for each in known if not name.startswith(f"{each}.")]
    near = difflib.get_close_matches(name, others, 3)
    misspelt = _resembling(name, near, 0.85, 0.8)
    refused = next((last for each in misspelt if (last := each.removeprefix("trainer.")) in REFUSED), "")
    if instead := None if prefix or (misspelt and not refused) else _instead(name):
        return f"{said}; {instead}"
    if refused:
        return f"{said}, and --trainer.{refused} cannot be set here: {in_brief(refused)}"
    ends = (f".{name}", f".{name.rpartition('.')[2]}")  # its group is left out, or another
    leaves = [each for each in others if not any(other.startswith(f"{each}.") for other in others)]
    same = next((found for end in ends if (found := [each for each in leaves if f".{each}".endswith(end)])), [])
    if meant := misspelt or (same if len(same) < 3 else []) or _resembling(name, near, 0.6, 0.5):
        return f"{said}; did you mean {' or '.join(f'--{prefix}{each}' for each in meant)}?"
    return f"{said}; there are {', '.join(known)}" if prefix else f"{said} (see --help)"


def _resembling(name: str, near: list[str], whole: float, last: float) -> list[str]:
    """The first that resembles `name` by these ratios: a long common beginning makes any two of a group near."""
    for other in near:
        end, of_other = name.rpartition(".")[2], other.rpartition(".")[2]
        alike = end in of_other or difflib.SequenceMatcher(None, of_other, end).ratio() >= last
        if alike and difflib.SequenceMatcher(None, other, name).ratio() >= whole:
            return [other]
    return []


def _instead(name: str) -> str | None:
    """What to do instead of setting `name` of another tool."""
    group, _, last = name.replace("-", "_").lower().rpartition(".")
    models = [model for model in ("student", "teacher") if difflib.get_close_matches(model, group.split("."), 1, 0.8)]
    if last in _PART and (models or last in _OF_BOTH):
        return f"use {' or '.join(f'--model.{model}.{_PART[last]}' for model in models or ('student', 'teacher'))}"
    if last in _SIZES and models != ["teacher"]:  # its sizes come with it
        return f"use --model.student.config.{_SIZES[last]}"
    return None if models or group.startswith("eval") else _INSTEAD.get(last)
