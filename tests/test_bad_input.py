"""Every known bad input, in one table: one clear line that names the setting, and nothing is lost.

Further forms of messages on files and tokens are tested beside the code (test_prepare.py, test_models.py).
"""

import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import arguments, error_of, run
from families import tiny
from safetensors.torch import load_file, save_file
from torch._inductor import config as inductor
from torch._inductor.exc import CppCompileError
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from salt_lightning import ModelSpec, SALTModule, cli
from salt_lightning.__main__ import main as start
from salt_lightning.command.parser import explain
from salt_lightning.command.settings import wrong_counts
from salt_lightning.errors import ConfigError
from salt_lightning.fit.device import require
from salt_lightning.run import run_lock

ON_LOSS = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/ce"}}
SWA, CRASH = "StochasticWeightAveraging", "OnExceptionCheckpoint"
FSDP2 = {"trainer.strategy": {"class_path": "salt_lightning.parallel.FSDP2"}, "trainer.devices": 2}
EARLY = "lightning.pytorch.callbacks.EarlyStopping"
MISSING = "runs/x/step-00000001.ckpt"
NARROW = {"hidden_size": 32, "num_attention_heads": 4}
SHORT = {"model.student.config": {**NARROW, "max_position_embeddings": 8}}
SMALL = {"model.student.config": {**NARROW, "vocab_size": 99}}
USE = r"is not supported; use auto, ddp, fsdp2, fsdp \(FSDP1\), or the class path of a subclass of these"
ERRORS = {
    "unknown key": ({"kd.wieght": 0.5}, r"--kd.wieght: there is no such setting; did you mean --kd.weight\?"),
    "an address to write to": (
        {"run": "s3://bucket/run", "checkpoint.folder": "gs://b/c", "checkpoint.export": "abfss://b@c/d"},
        r"^error: --run s3://bucket/run is an address; give .* mounted; --checkpoint.folder gs://b/c is an .*; "
        r"--checkpoint.export abfss://b@c/d is an",
    ),
    "an address to read from": (
        {"data.cache_dir": "hdfs://c", "data.difficulty": "file:///d", "model.teacher.path": "s3://b/c.ckpt"},
        r"^error: --model.teacher.path s3://b/c.ckpt is an .*; --data.difficulty file:///d is .*; "
        r"--data.cache_dir hdfs://c is an address",
    ),
    "variables that no shell has replaced": (
        {"run": "runs/$SLURM_JOB_ID", "data.cache_dir": "${oc.env:HOME}/c", "checkpoint.folder": "a$b"},
        r"^error: --run runs/\$SLURM_JOB_ID has \$SLURM_JOB_ID, which only a shell [^;]*; give the folder itself; "
        r"--data.cache_dir \${oc.env:HOME}/c has \${oc.env:HOME}, which only a shell [^;]*; give the folder itself$",
    ),
    "a name near one that cannot be set": (
        {"trainer.epochs": 3},
        r"--trainer.epochs: there is no such setting; use --trainer.max_steps: tokens / ",
    ),
    "the home of nobody": (
        {"run": "~nobody-here/run", "data.cache_dir": "~nobody-here/cache", "ckpt_path": "last"},
        r"^error: --run ~nobody-here/run begins with ~, but there is no such user; give the folder itself; .*--data.ca",
    ),
    "a name of bytes that are no text": (
        {"run": "runs/caf\udce9"},
        r"^error: --run runs/caf\\udce9 is not valid UTF-8; give another name$",
    ),
    "unknown key in a spec": ({"model.student.famly": "llama"}, r"famly"),
    "unknown size": ({"model.student.config": {"hiden_size": 32}}, r"config.hiden_size: llama has no such setting"),
    "of a class in a list, and everything else at once": (
        {
            "trainer.callbacks": [{"class_path": EARLY, "init_args": {"patience": "x"}}, {"class_path": "Timer"}],
            "data.block_sizes": 32,
            "model.optim.lr": -1,
            "data.source": "nowhere.txt",
        },
        r"^error: --trainer.callbacks.init_args.patience x must be .*; --data.block_sizes: there is no such setting; "
        r"did you mean --data.block_size\?; --model.optim.lr -1.0 must be above 0.*; --data.source: 'nowhere.txt'",
    ),
    "of Lightning, of a class, of the model and of the text at once": (
        {
            "trainer.limit_train_batches": 5,
            "kd.weight": 1.5,
            "kd.steps": 99,
            "data.source": "no/*",
            "model.student.config": {**NARROW, "hiden": 1},
        },
        r"error: --trainer.limit_train_batches 5, .*; --kd.weight 1.5 must .*; --kd.steps 99 is larger .*"
        r"; --model.student.config.hiden: llama has no .*; --data.source: ",
    ),
    "what cannot be read, and what cannot work": (
        {"data.block_size": "x", "kd.weight": 1.5, "trainer.log_every_n_steps": 0, "data.source": "no/*"},
        r"^error: --data.block_size x must be a whole number; --trainer.log_every_n_steps 0 [^;]*; --kd.weight 1.5 "
        r"[^;]*; --data.source: 'no/\*' matches no file; give [^;]*$",
    ),
    "names of no settings, without what would follow from their absence": (
        {"kd.step": 2, "model.optim.ir": 1, "kd.steps": None, "model.teacher.pth": "x"},
        r"^error: --kd.step: there is no such setting; did you mean --kd.steps\?; --model.optim.ir: [^;]*; did you "
        r"mean --model.optim.lr\?; --model.teacher.pth: [^;]*; did you mean --model.teacher.path\?$",
    ),
    "a name of no setting, without what the sizes of another family would lack": (
        {"model.student.famly": "gpt2", "model.student.config": {"n_embd": 32}},
        r"^error: --model.student.famly: there is no such setting; did you mean --model.student.family\?$",
    ),
    "a comment, a seed and an address": (
        {"data.val_rows": "#9", "seed_everything": -1, "checkpoint.folder": "s3://x", "model.optim.lr": -1},
        r"^error: --data.val_rows '#9' is a comment [^;]*; give null, or a value; --checkpoint.folder s3://x is an "
        r"address; give [^;]*; --seed_everything -1 must [^;]*; --model.optim.lr -1.0 must [^;]*$",
    ),
    "what cannot be read, when resuming": (
        {"data.block_size": "x", "kd.weight": 1.5, "ckpt_path": "last"},
        r"^error: --data.block_size x must be a whole number$",
    ),
    "a ramp without its end, and what its shape would miss without a ramp": (
        {"kd.shape": "linear", "kd.anneal_steps": 2},
        r"error: --kd.anneal_steps 2 needs --kd.steps, where the ramp ends; --kd.weight 0.5 needs a teacher: [^;]*$",
    ),
    "a ramp of negative length, among others": (
        {"kd.weight": 0.0, "kd.shape": "linear", "kd.steps": 4, "kd.anneal_steps": -2, "model.optim.warmup_steps": 99},
        r"error: --kd.anneal_steps -2 must not be negative; --model.optim.warmup_steps 99 [^;]*; for a shorter [^;]*$",
    ),
    "steps below zero": ({"kd.steps": -1}, r"error: --kd.steps -1 must not be negative \(null = the whole run\); --kd"),
    "Python's word for null": (
        {"kd.steps": "None", "kd.weight": "None", "trainer.logger": "None"},
        r"^error: --kd.weight null must be a [^;]*; --kd.steps None must be a whole number or null; --trainer.logger N",
    ),
    "empty, as of a variable that is not set": (
        {"kd.steps": "", "data.block_size": "", "kd.shape": "", "trainer.callbacks": ""},
        r"^error: --data.block_size '' must be a whole number; --kd.steps '' must be a whole number or null; "
        r"--kd.shape '' must be step or [^;]*; --trainer.callbacks '' must be Callback or null; --kd.weight 0.5 needs",
    ),
    "a setting below one that is no group": (
        {"kd.steps.x": 3, "data.source.train": "x"},
        r"error: --kd.steps.x: there is no such setting, as --kd.steps is no group of them; --data.source.train: there",
    ),
    "wrong type": ({"kd.steps": "many"}, r"--kd.steps many must be a whole number or null"),
    "wrong type, seed": ({"seed_everything": 1.0}, r"^error: --seed_everything 1.0 must be a whole number$"),
    "a class in a list with one that is none": (
        {"trainer.callbacks": ["LearningRateMonitor", ON_LOSS, "Foo"]},
        r"--trainer.callbacks \['\S+LearningRateMonitor', '\S+EarlyStopping', 'Foo'\] must be .*; no class Foo is inst",
    ),
    "wrong type, model": ({"model.compile": 1}, r"--model.compile 1 must be true or false"),
    "wrong type, data": ({"data.block_size": [1]}, r"--data.block_size \[1\] must be a whole number"),
    "wrong type, checkpoint": ({"checkpoint.at_steps": 5}, r"--checkpoint.at_steps 5 must be "),
    "wrong type, trainer": ({"trainer.max_steps": 2.5}, r"--trainer.max_steps 2.5 must be a whole number"),
    "a choice that is none": ({"kd.shape": "foo"}, r"--kd.shape foo must be step or linear or linear_ratio or cosine"),
    "a number that YAML takes for another": (
        {
            "kd.steps": "1:30",
            "data.block_size": "0_32",
            "kd.weight": "000.5",
            "trainer.max_steps": "007",
            "checkpoint.at_steps": "[1, 010]",
            "data.text_column": "010",
            "trainer.callbacks+": "{class_path: Timer, init_args: {duration: {minutes: 1:30}}}",
        },
        r"^error: --data.block_size: 0_32 reads as 26 in YAML; write a number without colons or zeros before it, and "
        r"text in quotes; --kd.steps: 1:30 reads as 90 [^;]*; [^;]*; --checkpoint.at_steps: 010 reads as 8 [^;]*; "
        r"[^;]*; --trainer.callbacks\+: 1:30 reads as 90 [^;]*; [^;]*; --kd.weight 0.5 needs a teacher: [^;]*$",
    ),
    "no number": ({"model.optim.lr": "nan"}, r"--model.optim.lr nan must be a finite number"),
    "out of range, model": ({"model.logits_budget_gib": 0}, r"--model.logits_budget_gib 0.0 must be above 0"),
    "out of range, student": (
        {"model.student.config": {"attention_dropout": 2}},
        r"attention_dropout 2 must lie in 0..1",
    ),
    "out of range, data": (
        {"data.val_rows": 0, "data.seed": -1},
        r"--data.val_rows: 0 must .*--data.seed: -1 must be 0",
    ),
    "a seed too large": ({"data.seed": 2**64}, r"--data.seed: \d+ must be 0 or more, and below 2\*\*63"),
    "a seed that is none": (
        {"seed_everything": -1},
        r"--seed_everything -1 must be a whole number from 0 to 4294967295",
    ),
    "a model's seed too large": ({"model.seed": 2**63}, r"--model.seed \d+ must be a whole number from 0 to \d+$"),
    "a model's seed below 0": ({"model.seed": -1}, r"--model.seed -1 must be a whole number from 0 to \d+$"),
    "out of range, checkpoint": ({"checkpoint.at_steps": [0]}, r"--checkpoint.at_steps \[0\] must be optimizer steps"),
    "out of range, trainer": (
        {"trainer.gradient_clip_val": -1},
        r"--trainer.gradient_clip_val -1.* must be 0 or more",
    ),
    "no steps": ({"trainer.max_steps": 0}, r"--trainer.max_steps: 0 is not a valid run length"),
    "endless": ({"trainer.max_steps": -1}, r"--trainer.max_steps: -1 is not a valid run length"),
    "no devices": ({"trainer.devices": 0}, r"--trainer.devices 0 must be from 1 to 1048576, or auto for all$"),
    "epochs": ({"trainer.max_epochs": 0}, r"--trainer.max_epochs 0: a run is counted in steps"),
    "epochs of validation": ({"trainer.check_val_every_n_epoch": 0}, r"n_epoch 0: .*use --trainer.val_check_interval"),
    "an interval of time": (
        {"trainer.val_check_interval": "00:00:01"},
        r"--trainer.val_check_interval 00:00:01 must be",
    ),
    "half precision": (
        {"trainer.precision": "16-mixed"},
        r"--trainer.precision 16-mixed must be 32 or 32-true or bf16",
    ),
    "a TPU that is not there": (
        {"trainer.accelerator": "tpu"},
        r"^error: --trainer.accelerator tpu: torch \S+ finds no such device here; use auto, .* or cpu",
    ),
    "an accelerator that is none": ({"trainer.accelerator": "foo"}, r"--trainer.accelerator foo: "),
    "a setting of a strategy that is no class": (
        {"trainer.strategy": "ddp", "trainer.strategy.process_group_backend": "nccl"},
        r"^error: --trainer.strategy.process_group_backend nccl is a setting of a class, but --trainer.strategy names "
        r"no class; give the class name, e.g. FSDP2 for fsdp2, DDPStrategy for ddp$",
    ),
    "a time of a strategy": (
        {"trainer.strategy": "DDPStrategy", "trainer.strategy.timeout": "soon"},
        r"^error: --trainer.strategy.timeout soon must be a time as H:MM:SS or null$",
    ),
    "NCCL on a CPU": (
        {
            "trainer.strategy": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "nccl"}},
            "trainer.devices": 2,
            "data.micro_batch_size": 4,
        },
        r"^error: --trainer.strategy.process_group_backend nccl is for GPUs; leave it out, or use gloo$",
    ),
    "a strategy that is none": ({"trainer.strategy": "foo"}, rf"^error: --trainer.strategy foo {USE}$"),
    "a strategy by another name": ({"trainer.strategy": "fsdp_2"}, rf"^error: --trainer.strategy fsdp_2 {USE}$"),
    "no strategy, but a function": ({"trainer.strategy": "os.path.join"}, rf"^error: --trainer.strategy os.* {USE}$"),
    "a strategy that Lightning would have installed": (
        {"trainer.strategy": "deepspeed_stage_2", "data.block_size": 0},
        rf"^error: --trainer.strategy deepspeed_stage_2 {USE}; --data.block_size: 0 must be",
    ),
    "its class": (
        {"trainer.strategy": {"class_path": "DeepSpeedStrategy", "init_args": {"stage": 2}}},
        rf"^error: --trainer.strategy DeepSpeedStrategy {USE}$",
    ),
    "a class that needs a mesh": (
        {
            "trainer.strategy": {"class_path": "ModelParallelStrategy"},
            "trainer.devices": 2,
            "data.micro_batch_size": 4,
        },
        rf"^error: --trainer.strategy ModelParallelStrategy {USE}$",
    ),
    "checkpoints off": (
        {"trainer.enable_checkpointing": False},
        r"checkpointing false: use .*null to save only at the end$",
    ),
    "barebones": ({"trainer.barebones": True}, r"barebones true: a run without .* leaves nothing; leave it out$"),
    "another root": ({"trainer.default_root_dir": "x"}, r"--trainer.default_root_dir x: use --run"),
    "a ramp longer than its phase": (
        {"kd.steps": 4, "kd.anneal_steps": 5, "kd.shape": "linear"},
        r"--kd.anneal_steps 5 is longer than --kd.steps 4",
    ),
    "a family without causal language model": (
        {"model.student.family": "t5"},
        r"--model.student.family t5 is not a causal language model",
    ),
    "a run that is a file": (
        {"run": "{bad}/empty.jsonl"},
        r"--run .*empty.jsonl: .*empty.jsonl is not a folder; choose",
    ),
    "a run below a file": ({"run": "{bad}/empty.jsonl/run"}, r"--run .*/run: .*empty.jsonl is not a folder; choose"),
    "checkpoints below a file": (
        {"checkpoint.folder": "/dev/null/x"},
        r"--checkpoint.folder /dev/null/x: /dev/null is no",
    ),
    "an export below a file": (
        {"checkpoint.export": "/dev/null/x"},
        r"--checkpoint.export /dev/null/x: /dev/null is no",
    ),
    "a cache that is a file": (
        {"data.cache_dir": "{bad}/empty.jsonl"},
        r"--data.cache_dir: .* cannot be written \(File ex",
    ),
    # --- text
    "a folder of a tokenizer that is not there": (
        {"data.tokenizer": "runs/nobody/tokenizer"},
        r"--data.tokenizer: the folder 'runs/nobody/tokenizer' does not exist; give a folder, hub name or train",
    ),
    "folders alone": (
        {"data.source": "{bad}/fold*"},
        r"--data.source: '.*' matches only folders, no file; give a file",
    ),
    "a broken line": (
        {"data.source": "{bad}/broken.jsonl"},
        r"broken.jsonl: line 3 is not JSON .*--data.bad_lines skip",
    ),
    "no object": (
        {"data.source": "{bad}/array.jsonl"},
        r"array.jsonl: line 2 is not a JSON object but '\[1\]'; write one object per line \(jq",
    ),
    "bytes that are no UTF-8": ({"data.source": "{bad}/latin.txt"}, r"latin.txt: line 1 is not UTF-8 text; convert"),
    "no text in its column": (
        {"data.source": "{bad}/number.jsonl"},
        r"'text' of .*number.jsonl: line 1 holds int, not te",
    ),
    "all lines bad": (
        {"data.source": "{bad}/number.jsonl", "data.bad_lines": "skip"},
        r"--data.source: no document with text in \S+number.jsonl: 1 bad line left out",
    ),
    "a choice of bad lines": ({"data.bad_lines": "drop"}, r"--data.bad_lines drop must be refuse or skip"),
    "validation text that is not there": ({"data.val_source": "no/*"}, r"--data.val_source: 'no/\*' matches no file"),
    "too little text": (
        {"data.source": "{bad}/word.txt", "data.val_source": "{bad}/word.txt"},
        r"--data.source: 2 training tokens do not fill one row of",
    ),
    "all to validation": (
        {"data.val_fraction": 0.99999},
        r"--data.val_fraction: 0.99999 left none of 120 documents for tr",
    ),
    "all to training": (
        {"data.val_fraction": 1e-9},
        r"--data.val_fraction: 1e-09 left none of 120 documents for valid",
    ),
    "a block longer than the text": (
        {"data.block_size": 10**6},
        r"do not fill one row of --data.block_size 1000000; add",
    ),
    # --- tokenizers
    "no tokenizer there": (
        {"data.tokenizer": "{bad}/folder"},
        r"--data.tokenizer: cannot load '.*/folder' \(it has no tokenizer.json\); give a folder, hub name or train$",
    ),
    "the folder of a run, for its tokenizer": (
        {"data.tokenizer": "{bad}/of_a_run"},
        r"--data.tokenizer: cannot load '(.*/of_a_run)' \([^:]*\); give \1/tokenizer$",
    ),
    "a broken tokenizer": (
        {"data.tokenizer": "{bad}/broken_tokenizer"},
        r"--data.tokenizer: cannot load '.*_tokenizer'",
    ),
    "a tokenizer without offsets": (
        {"data.tokenizer": "{bad}/slow_tokenizer"},
        r"--data.tokenizer: '.*slow_tokenizer' has no tokenizer.json; save it as a fast tokenizer first$",
    ),
    "a tokenizer without EOS": ({"data.tokenizer": "{bad}/no_eos"}, r"--data.tokenizer: '.*no_eos' has no eos_token"),
    "fewer tokens than bytes": ({"data.vocab_size": 256}, r"--data.vocab_size: 256 must be 257 or more"),
    # --- teachers
    "a teacher that is a file": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/word.txt"},
        r"word.txt is a file; give the",
    ),
    "a teacher without config": ({"kd.steps": 6, "model.teacher.path": "{bad}/folder"}, r"folder without config.json"),
    "a teacher without weights": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/noweights"},
        r"noweights has no weights:",
    ),
    "half a teacher": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/half"},
        r"half lacks model-00002-of-.*, which its mod",
    ),
    "a teacher cut off": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/cut"},
        r"cut: model.safetensors is cut off or dam",
    ),
    "a teacher that lacks a weight": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/lacks"},
        r"lacks lacks 1 of its weights: model.norm.weight; is the download complete",
    ),
    "a teacher saved inside a compiled one": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/compiled"},
        r"compiled lacks \d+ of its weights: .*; it has _orig_mod.*: save it again without what wraps it",
    ),
    "a teacher of more layers": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/shallow"},
        r"shallow has weights for more layers than its config.json says: model.layers.1.input_layernorm.weight, ",
    ),
    "a teacher of other sizes": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/sizes"},
        r"sizes has \d+ weights with other sizes than its config.json says: .* is \(\d+, \d+\), not \(\d+, \d+\)",
    ),
    "a teacher without layers": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/layerless"},
        r"--model.teacher.path .*layerless: its config.json says num_hidden_layers -1; it must be 1 or more",
    ),
    "an encoder": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/bert"},
        r"bert contains a BertForMaskedLM, whose tokens see",
    ),
    "another kind of model": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/t5"},
        r"t5 is not a causal language model that",
    ),
    "a teacher with code": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/code"},
        r"code needs model code that comes with it .* --model.teacher.trust_remote_code true",
    ),
    "a student with code": (
        {"kd.weight": 0.0, "model.student.path": "{bad}/code", "model.student.trust_remote_code": True},
        r"code needs model code that comes with it .*; to train it, use a model type of transformers: checkpoints hold",
    ),
    "a student whose code could be trusted, but is not in its checkpoints": (
        {"kd.weight": 0.0, "model.student.path": "{bad}/good", "model.student.trust_remote_code": True},
        r"^error: --model.student.trust_remote_code true: checkpoints hold no code, [^;]*; leave it out$",
    ),
    "a teacher of a broken config": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/json"},
        r"json/config.json is not valid JSON",
    ),
    "a teacher whose config is a list": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/list"},
        r"list/config.json contains '\[\]' instead of settings; download it again$",
    ),
    "an index that names no weights": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/nameless"},
        r"nameless: model.safetensors.index.json names no weight files; download it again$",
    ),
    "an index too large to be one": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/huge"},
        r"huge/model.safetensors.index.json is not valid JSON \(larger than 256 MiB\); download it again$",
    ),
    "a teacher whose logits overflow": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/loud"},
        r"--model.teacher.path: the teacher's logits are not finite: its weights are damaged, or too large for --model."
        r"teacher.dtype float32$",
    ),
    "a revision of nothing": (
        {"model.student.revision": "v1"},
        r"^error: --model.student.revision v1 is for hub names; give one as --model.student.path$",
    ),
    "attention that a CPU cannot train": (
        {"model.student.attention": "flex_attention"},
        r"^error: --model.student.attention flex_attention cannot be trained on a CPU; use sdpa, or a GPU$",
    ),
    "a revision of a folder": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/folder", "model.teacher.revision": "v1"},
        r"--model.teacher.revision v1 is for hub names",
    ),
    "a vocabulary of another size": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/good", "data.vocab_size": 329},
        r"good has a vocabulary of 320, --data.tokenizer 329: use the tokenizer that this teacher was trained with",
    ),
    "the same size and other ids": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/other_ids", "data.tokenizer": "{bad}/tokenizer"},
        r"name \d+ token ids differently: id \d+ is '.+' here and '.+' there, id \d+ is.*; use the tokenizer that this "
        r"teacher was trained with, --data.tokenizer .*/other_ids",
    ),
    "a teacher's damaged checkpoint": (
        {"kd.steps": 6, "model.teacher.path": "{bad}/flipped.ckpt"},
        r"--model.teacher.path .*flipped.ckpt is damaged \(.* has changed since it was written\)",
    ),
    "a checkpoint that is something else": (
        {"ckpt_path": "{bad}/word.txt"},
        r"--ckpt_path .*word.txt is not a whole chec",
    ),
    "a checkpoint that is a folder": (
        {"ckpt_path": "{bad}/folder"},
        r"--ckpt_path .*folder is not .*\(meta.pt is missing",
    ),
    "an empty checkpoint": (
        {"ckpt_path": "{bad}/empty.jsonl"},
        r"is not a whole checkpoint of this project \(empty\); give one of .*, or last",
    ),
    "weight outside 0..1": ({"kd.weight": 1.5}, r"--kd.weight 1.5 must be in 0..1"),
    "two at once": ({"kd.weight": 1.5, "kd.anneal_steps": -2}, r"--kd.weight 1.5 .*--kd.anneal_steps -2"),
    "phase longer than the run": (
        {"kd.steps": 99, "model.teacher.path": "{teacher}"},
        r"shorten both, e.g. --trainer.max_steps 12 --kd.steps 2",
    ),
    "no teacher": (
        {"kd.weight": 0.5, "model.teacher.path": "null"},
        r"--kd.weight 0.5 needs a teacher: set --model.teacher.path",
    ),
    "missing teacher": (
        {"kd.steps": 6, "model.teacher.path": MISSING},
        rf"--model.teacher.path {MISSING} does not exist",
    ),
    "text of a class that begins like a mapping, and is none": (
        {"trainer.logger": "CSVLogger", "trainer.logger.save_dir": "x", "trainer.logger.prefix": "{", "kd.weight": 2},
        r"^error: --kd.weight 2.0 must be [^;]*$",
    ),
    "text at an address": (
        {"data.source": "s3://bucket/text.jsonl", "data.val_source": "hf://datasets/owner/name"},
        r"--data.source: 's3://bucket/text.jsonl' is an address, which is not read; download it, [^;]*; "
        "--data.val_source: 'hf://datasets/owner/name' is an address",
    ),
    "sources that match nothing": (
        {"data.source": ["no/*.txt", "s3://bucket/x"]},
        r"^error: --data.source: 'no/\*.txt' matches no file; [^;]*; --data.source: 's3://bucket/x' is an address, ",
    ),
    "a source that matches nothing": ({"data.source": "no/*.jsonl"}, r"--data.source.*no/\*.jsonl.* matches no file"),
    "an empty corpus": (
        {"data.source": "{bad}/empty.jsonl"},
        r"--data.source: '.*empty.jsonl' holds no text: its files",
    ),
    "another column": ({"data.text_column": "body"}, r"--data.text_column"),
    "batches that do not divide": ({"data.micro_batch_size": 3}, r"--data.global_batch_size"),
    "accumulation by hand": (
        {"trainer.accumulate_grad_batches": 2},
        r"--trainer.accumulate_grad_batches 2 follows from",
    ),
    "clipping by value": (
        {"trainer.gradient_clip_algorithm": "value"},
        r"--trainer.gradient_clip_algorithm value is not supported; use norm",
    ),
    "more devices than there are": ({"trainer.devices": 2**63}, rf"--trainer.devices {2**63} must be from 1 to"),
    "no node": ({"trainer.num_nodes": -1}, r"--trainer.num_nodes -1 must be from 1 to 1048576$"),
    "a duration without unit": ({"trainer.max_time": "99"}, r"--trainer.max_time 99: `Timer\(duration='99'\)` is not"),
    "a class that is not there": (
        {"trainer.logger": "no.such.Logger"},
        r"--trainer.logger no.such.Logger must be Logger or true or false or null: No module named 'no'$",
    ),
    "a name of no class": (
        {"trainer.callbacks": "NoSuch"},
        r"NoSuch must be Callback or null; no class NoSuch is installed; give its full name, package.module.Class$",
    ),
    "a class without what it needs": (
        {"trainer.logger": "CSVLogger"},
        r"^error: --trainer.logger CSVLogger requires save_dir; give it as --trainer.logger.init_args.save_dir$",
    ),
    "a class in a list without what it needs, and everything else at once": (
        {
            "trainer.callbacks": [{"class_path": "LearningRateMonitor"}, {"class_path": "EarlyStopping"}],
            "data.block_size": 1,
            "kd.weight": 1.5,
        },
        r"error: --trainer.callbacks EarlyStopping requires monitor; give it as --trainer.callbacks.init_args.monitor; "
        r"--data.block_size: 1 must [^;]*; --kd.weight 1.5 must [^;]*$",
    ),
    "a class that lacks a setting, before another in a list": (
        {"trainer.callbacks": ["EarlyStopping", "LearningRateMonitor"]},
        r"^error: --trainer.callbacks EarlyStopping requires monitor; give it in the list, below init_args of EarlySt",
    ),
    "a class that lacks two settings": (
        {"trainer.plugins": "MixedPrecision"},
        r"MixedPrecision requires precision, device; give it as --trainer.plugins.init_args.precision$",
    ),
    "another way to write checkpoints": (
        {"trainer.plugins": ["AsyncCheckpointIO"]},
        r"--trainer.plugins: another CheckpointIO is not supported: it would write without checksums; leave it out$",
    ),
    "another CheckpointIO in the strategy": (
        {
            "trainer.strategy": "{class_path: DDPStrategy, init_args: "
            "{checkpoint_io: lightning.pytorch.plugins.io.AsyncCheckpointIO}}"
        },
        r"^error: --trainer.strategy: another CheckpointIO is not supported: it would write without checksums; leave",
    ),
    "an empty precision": ({"trainer.precision": ""}, r"^error: --trainer.precision '' must be 32 or 32-true or bf16"),
    "an argument that a class does not take": (
        {"trainer.callbacks": "EarlyStopping", "trainer.callbacks.monitr": "x"},
        r"^error: --trainer.callbacks.monitr: there is no such setting; did you mean --trainer.callbacks.monitor\?$",
    ),
    "an argument like none that a class takes": (
        {**FSDP2, "trainer.strategy.zzz": 1, "data.micro_batch_size": 4},
        r"^error: --trainer.strategy.zzz: there is no such setting; there are replicas, shard_teacher, "
        r"save_distributed_checkpoint, timeout_minutes$",
    ),
    "a wrong value of a class's setting": (
        {**FSDP2, "trainer.strategy.replicas": "x", "data.micro_batch_size": 4},
        r"^error: --trainer.strategy.replicas x must be a whole number$",
    ),
    "the same in a list": (
        {"trainer.callbacks": [{"class_path": "Timer"}, {"class_path": EARLY, "init_args": {"patience": "x"}}]},
        r"^error: --trainer.callbacks.init_args.patience x must be a whole number$",
    ),
    "a number that reads as a comment": (
        {"kd.steps": "#5"},
        r"--kd.steps '#5' is a comment in YAML, so it reads as null; give null, or a value",
    ),
    "names two levels within a mapping, of which jsonargparse would keep one": (
        {
            "model.student.config": {"hidden_size": 32, "rope_parameters": {"rope_type": "yarn"}},
            "model.student.config.rope_parameters.factor": 4,
        },
        r"^error: --model.student.config.rope_parameters.factor 4: a dotted name sets only the first level of a "
        r"mapping; give the whole --model.student.config.rope_parameters '\{NAME: VALUE, ",
    ),
    "a callback that chooses the start": (
        {"trainer.callbacks": [{"class_path": f"lightning.pytorch.callbacks.{CRASH}", "init_args": {"dirpath": "x"}}]},
        rf"--trainer.callbacks {CRASH} is not supported: any later run would start from its file; use --checkpoint",
    ),
    "a callback that counts epochs": (
        {"trainer.callbacks": [{"class_path": f"lightning.pytorch.callbacks.{SWA}", "init_args": {"swa_lrs": 0.01}}]},
        rf"--trainer.callbacks {SWA} is not supported: it counts epochs, and a run has only one, so",
    ),
    "a callback of which Lightning cannot load the state": (
        {"trainer.callbacks": [{"class_path": "SpikeDetection"}]},
        r"--trainer.callbacks SpikeDetection is not supported: Lightning cannot load its state, so no checkpoint",
    ),
    **{
        f"a {kind} that acts at epochs": (
            {"trainer.callbacks": [{"class_path": kind, "init_args": own}]},
            rf"--trainer.callbacks {kind} is not supported: it acts at the ends of epochs, and a run has only one",
        )
        for kind, own in {
            "Timer": {"duration": "00:00:10:00", "interval": "epoch"},
            "ModelCheckpoint": {"every_n_epochs": 2},
            "EarlyStopping": {"monitor": "val/ce", "check_on_train_epoch_end": True},
            "EMAWeightAveraging": {"update_starting_at_epoch": 1},
        }.items()
    },
    "an average that begins after the end": (
        {"trainer.callbacks": [{"class_path": "EMAWeightAveraging", "init_args": {"update_starting_at_step": 12}}]},
        r"EMAWeightAveraging is not supported: update_starting_at_step is not before --trainer.max_steps, so nothing",
    ),
    "several callbacks at once": (
        {
            "trainer.callbacks": [
                {"class_path": "SpikeDetection"},
                {"class_path": EARLY, "init_args": {"monitor": "x"}},
            ],
            "trainer.max_time": "00:00:00:00",
        },
        r"--trainer.max_time 0 leaves no time to train; give more, or leave it out; --trainer.callbacks SpikeDet.*; "
        r"--trainer.callbacks EarlyStopping: monitor x is never logged",
    ),
    "a callback twice": (
        {"trainer.callbacks": [ON_LOSS, ON_LOSS]},
        r"error: --trainer.callbacks .*: Found more than one stateful callback of type `EarlyStopping`",
    ),
    "a second callback for checkpoints": (
        {"trainer.callbacks": [{"class_path": "salt_lightning.checkpoint.RunCheckpoint"}]},
        r"the Trainer has 2 RunCheckpoints, but only one can be used; use --checkpoint",
    ),
    "a callback for a validation that there is not": (
        {
            "trainer.callbacks": [ON_LOSS],
            "trainer.limit_val_batches": 0,
        },
        r"--trainer.callbacks EarlyStopping acts at validations, but --trainer.limit_val_batches 0 turns them off",
    ),
    "a callback that monitors the step, which only ModelCheckpoint can": (
        {"trainer.callbacks": [{"class_path": EARLY, "init_args": {"monitor": "step"}}]},
        r"--trainer.callbacks EarlyStopping: monitor step is never logged; use val/ce or one of val/ce/SOURCE",
    ),
    "a callback that monitors a source that there is not": (
        {"trainer.callbacks": [{"class_path": EARLY, "init_args": {"monitor": "val/ce/nosuch"}}]},
        r"--trainer.callbacks EarlyStopping: monitor val/ce/nosuch is never logged; use val/ce or one of val/p",
    ),
    "a callback that monitors what nobody logs": (
        {"trainer.callbacks": [{"class_path": EARLY, "init_args": {"monitor": "val_loss"}}]},
        r"--trainer.callbacks EarlyStopping: monitor val_loss is never logged; use val/ce",
    ),
    "warm-up longer than the run": ({"model.optim.warmup_steps": 50}, r"--model.optim.warmup_steps 50"),
    "sizes that are null": ({"model.student.config": None}, r"^error: --model.student.config null must be a mapping$"),
    "no number of steps": ({"trainer.max_steps": None}, r"--trainer.max_steps null must be a whole number"),
    "rate of zero": ({"model.optim.lr": 0}, r"--model.optim.lr 0.* must be above 0"),
    "temperature of zero": ({"model.teacher_temperature": 0}, r"--model.teacher_temperature 0.* must be above 0"),
    "missing checkpoint": (
        {"ckpt_path": "gone.ckpt"},
        r"--ckpt_path gone.ckpt does not exist; give one of RUN/checkpoints/step-\*.ckpt, or last, which finds",
    ),
    "mappings for groups": (
        {
            "model": "{optim: {lr: a, beta1: 2.0}, teacher: {pth: x}}",
            "checkpoint": "{at_steps: 3, keep: -1}",
            "trainer.max_steps": "5x",
        },
        r"^error: --trainer.max_steps 5x must be a whole number; --model.optim.lr a must be a finite number; "
        r"--checkpoint.at_steps 3 must be null or a list of whole numbers; --model.teacher.pth: there is no such "
        r"setting; did you mean --model.teacher.path\?; --model.optim.beta1 2.0 must [^;]*; --checkpoint.keep -1 must ",
    ),
    "a file for a group": (
        {"model.teacher": "{bad}/latin.txt"},
        r"--model.teacher \S+/latin.txt must be a mapping of its settings \(see "
        r"--help\); for a checkpoint, a folder or a hub name, use --model.teacher.path$",
    ),
    "a file for a group in a file": (
        {"config": "{model: {teacher: {bad}/latin.txt}}"},
        r"^error: a file is named where a mapping of settings belongs",
    ),
    "a folder for a group": (
        {"model.student": "{bad}/folder"},
        r"--model.student \S+/folder must be .*, use --model.student.path$",
    ),
    "a class for a group": (
        {"model": "mine.Mine"},
        r"--model mine.Mine must be .*; classes of your own are used in Py",
    ),
    "a file for another group": (
        {"data.keep": "{bad}/latin.txt"},
        r"keep \S+/latin.txt must be a mapping of .*; leave",
    ),
    "a checkpoint without a name": ({"ckpt_path": ""}, r"^error: --ckpt_path '' is empty; give a .ckpt file, or last"),
    "no message": ({"data.examples.messages": []}, r"--data.examples.messages \[\] has no message; give messages"),
    "a missing text, tokenizer, selection and thirds": (
        {f"data.{name}": f"/no/{name}" for name in ("source", "val_source", "tokenizer", "selection", "difficulty")},
        r"--data.source: '/no/source' matches no file; .*; --data.val_source: '/no/val_source' matches no file; .*; "
        r"--data.tokenizer: the folder '/no/tokenizer' does not exist; .*; --data.difficulty /no/difficulty: no "
        r"validate/documents.parquet in it; .*; --data.selection: /no/selection/scores.json does not exist; ",
    ),
    "a device that is not there, with other settings": (
        {"trainer.accelerator": "tpu", "trainer.strategy": "fsdp", "data.block_size": 1},
        r"^error: --trainer.accelerator tpu: torch \S+ finds no such device here; use auto, [^;]*; "
        r"--data.block_size: 1 must be 2 or more, and below 2\*\*31$",
    ),
    "a list with a column without a name": (
        {"data.text_column": ["text", ""]},
        r"text_column: \['text', ''\] names no co",
    ),
    "a column without a name": ({"data.text_column": ""}, r"--data.text_column: '' names no column$"),
    "no column of text": ({"data.text_column": []}, r"--data.text_column: \[\] names no column$"),
    "an abbreviation": ({"trainer.max_step": 3}, r"max_step"),
    "validation interval of zero": ({"trainer.val_check_interval": 0}, r"--trainer.val_check_interval 0 must be"),
    "log interval of zero": ({"trainer.log_every_n_steps": 0}, r"--trainer.log_every_n_steps 0 must be at least 1"),
    "a least number of epochs": (
        {"trainer.min_epochs": 2},
        r"--trainer.min_epochs 2: a run is counted in steps; use --",
    ),
    "limited batches": ({"trainer.limit_train_batches": 5}, r"limit_train_batches 5, .*; use --trainer.max_steps"),
    "part of the validation": (
        {"trainer.limit_val_batches": 2},
        "--trainer.limit_val_batches 2 counts micro-batches, so what is measured "
        "would depend on --data.micro_batch_size and the number of devices; use --data.val_rows",
    ),
    "a share of the test": ({"trainer.limit_test_batches": 0.5}, "--trainer.limit_test_batches 0.5 counts micro-batch"),
    "rows left unscored": (
        {"trainer.limit_predict_batches": 0.5},
        "limit_predict_batches 0.5 would leave rows without",
    ),
    "heads that do not divide": (
        {"model.student.config": {"hidden_size": 33, "num_attention_heads": 2}},
        r"--model.student.config: ValueError: The hidden size \(33\) is not a multiple of",
    ),
    "shapes that do not match": (
        {"model.student.config": {**NARROW, "num_key_value_heads": 3}},
        r"--model.student: LlamaForCausalLM cannot be run with its settings \(num_key_value_heads 3 does not divide "
        r"num_attention_heads 4\): RuntimeError: The size of tensor a \(4\)",
    ),
    "sizes below one, before any text is read": (
        {
            "model.student.config": {"hidden_size": 0, "num_hidden_layers": -1, "vocab_size": "many", "hiden": 1},
            "data.source": "no/*",
        },
        r"config.hiden: llama has no such.*; --model.student.config.hidden_size 0 must be a whole number, 1 or more; "
        r"--model.student.config.num_hidden_layers -1 must .*; --model.student.config.vocab_size many must be",
    ),
    "a size below one by its family's name": (
        {"model.student.family": "gpt2", "model.student.config": {"n_layer": 0, "n_inner": None}},
        r"error: --model.student.config.n_layer 0 must be a whole number, 1 or more$",
    ),
    "sizes for a teacher": (
        {"model.teacher.config": {"hidden_size": 0}},
        r"--model.teacher.config {'hidden_size': 0}: the sizes come from --model.teacher.path; leave it out",
    ),
    "no sizes": ({"model.student.config": {}}, r"--model.student.config is empty: .*; give sizes, e.g. hidden_size"),
    "no such attention": ({"model.student.attention": "nope"}, r"--model.student.config: .*nope"),
    "no GPU": (
        {"trainer.accelerator": "gpu"},
        r"^error: --trainer.accelerator gpu: torch \S+ finds no such device here; use auto, .* or cpu",
    ),
    "a precision that is none": (
        {"trainer.precision": "fp17"},
        r"^error: --trainer.precision fp17 must be 32 or 32-true or bf16 or bf16-mixed or bf16-true$",
    ),
    "interval of zero": ({"checkpoint.every_n_steps": 0}, r"--checkpoint.every_n_steps 0 must be at least 1"),
    "an activation that is none": (
        {"model.student.config": {**NARROW, "hidden_act": "sily"}},
        r"error: --model.student.config.hidden_act sily is not known; use e.g. silu$",
    ),
    "a short position table by its own name": (
        {
            "model.student.family": "gpt2",
            "model.student.config": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 8},
        },
        r"--model.student.config.n_positions 8 is smaller than --data.block_size 32",
    ),
    "a short position table": (SHORT, r"max_position_embeddings 8 is smaller than --data.block_size 32"),
    "a small vocabulary": (SMALL, r"vocab_size 99 is smaller than the tokenizer's 300"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory, teacher, settings) -> Path:
    """A folder of files, teachers and tokenizers, each bad in one way."""
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "empty.jsonl": b"", "broken.jsonl": b'{"text": "a"}\n\n{"text": "b\n', "array.jsonl": b'{"text": "a"}\n[1]\n',
        "latin.txt": "sch\u00f6n".encode("latin-1"), "number.jsonl": b'{"text": 1}\n', "word.txt": b"h",
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    (folder / "of_a_run" / "tokenizer").mkdir(parents=True)
    model = tiny("llama", vocab_size=320, max_position_embeddings=64).model
    model.save_pretrained(folder / "good")
    for name in (
        "noweights", "cut", "lacks", "sizes", "shallow", "layerless", "json", "list", "loud", "nameless", "huge",
        "code", "other_ids", "compiled",
    ):  # fmt: skip
        shutil.copytree(folder / "good", folder / name)
    model.save_pretrained(folder / "half", max_shard_size="20KB")
    (folder / "half" / sorted(path.name for path in (folder / "half").glob("*.safetensors"))[1]).unlink()
    (folder / "noweights" / "model.safetensors").unlink()
    whole = (folder / "good" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(whole[:-100])
    weights = load_file(folder / "good" / "model.safetensors")
    save_file({k: w for k, w in weights.items() if k != "model.norm.weight"}, folder / "lacks" / "model.safetensors")
    wrapped = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    save_file(wrapped, folder / "compiled" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "good" / "config.json").read_text())
    (folder / "sizes" / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    (folder / "shallow" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    (folder / "layerless" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": -1}))
    (folder / "json" / "config.json").write_text("{")
    (folder / "list" / "config.json").write_text("[]")
    louder = {name: weights[name] * 1e20 for name in ("model.norm.weight", "lm_head.weight")}
    save_file({**weights, **louder}, folder / "loud" / "model.safetensors")
    for name, size in ("nameless", 2), ("huge", 2**28 + 1):
        (folder / name / "model.safetensors").unlink()
        with (folder / name / "model.safetensors.index.json").open("wb") as file:
            file.write(b"{}")
            file.truncate(size)  # takes no space on the disk
    (folder / "slow_tokenizer").mkdir()
    (folder / "slow_tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    auto = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.M"}}
    (folder / "code" / "config.json").write_text(json.dumps({**config, **auto}))
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text('{"model_type": "t5"}')
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(**sizes, vocab_size=320)).save_pretrained(folder / "bert")
    tokenizer = AutoTokenizer.from_pretrained(Path(teacher).parents[1] / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    rules = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    for name in ("other_ids", "broken_tokenizer", "no_eos"):
        tokenizer.save_pretrained(folder / name)
    vocab = rules["model"]["vocab"]
    a, b = list(vocab)[5:7]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "other_ids" / "tokenizer.json").write_text(json.dumps(rules))
    (folder / "broken_tokenizer" / "tokenizer.json").write_text("{")
    plain = json.loads((folder / "no_eos" / "tokenizer_config.json").read_text())
    (folder / "no_eos" / "tokenizer_config.json").write_text(json.dumps({**plain, "eos_token": None}))
    content = bytearray(Path(teacher).read_bytes())
    weight = torch.load(teacher, weights_only=True)["state_dict"]["student.model.model.norm.weight"]
    content[content.index(weight.numpy().tobytes()) + 5] ^= 1
    (folder / "flipped.ckpt").write_bytes(content)
    return folder


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_an_error_that_names_the_setting(case, settings, teacher, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides, message = ERRORS[case]

    def filled(value):
        return value.replace("{teacher}", teacher).replace("{bad}", str(bad)) if isinstance(value, str) else value

    overrides = {key: filled(value) for key, value in overrides.items()}
    base = {"run": str(tmp_path / "run"), "kd.weight": 0.0}
    if "kd.steps" in overrides or "kd.anneal_steps" in overrides:
        base["kd.weight"] = 0.5
    assert run(["fit", *arguments(settings, base, overrides)]) == 2
    line = error_of(capsys)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()  # the next start there is a first one


def test_of_a_weight_that_is_missing_transformers_prints_no_table(settings, bad, tmp_path, monkeypatch):
    printed = []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.5, "kd.steps": 6, "model.teacher.path": f"{bad}/lacks"}
    assert run(["fit", *arguments(settings, own)]) == 2
    assert printed == []


def test_what_cannot_be_read_in_a_file_hides_nothing_else_in_it(settings, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(
        "data: {block_size: x, val_rows: 0}\nmodel: {optim: {lr: -1}, studnt: {dtype: fp32}}"
    )
    words = arguments(settings, {"kd.weight": 0.0, "run": str(tmp_path / "run")}, {})
    words = [word for word in words if not word.startswith(("--data.block_size", "--model.optim.lr"))]
    assert run(["fit", f"--config={tmp_path}/x.yaml", *words]) == 2
    line = error_of(capsys)
    said = ("--data.block_size x", "--model.studnt", "--data.val_rows: 0", "--model.optim.lr -1.0")
    assert all(each in line for each in said), line
    assert line.count("; --") == len(said) - 1, line


def test_a_problem_that_does_not_begin_with_its_setting_has_a_line_of_its_own_too(
    settings, tmp_path, monkeypatch, capsys
):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.blok_size": 8}
    assert run(["validate", *arguments(settings, own)]) == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first == "error: --data.blok_size: there is no such setting; did you mean --data.block_size?"
    assert second.startswith("error: validate needs --ckpt_path")

    monkeypatch.setenv("RANK", "0")  # as an operator of Kubernetes does
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["fit", *arguments(settings, {**own, "data.val_rows": 0})]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["error:", "--data.blok_size:"],
        ["error:", "--data.val_rows:"],
        ["error:", "RANK"],
    ], lines


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"Missing required keys in .*'factor'"),
        ({"max_position_embeddings": 8}, "max_position_embeddings 8 is smaller than --data.block_size"),
    ],
)
def test_sizes_that_need_no_tokenizer_are_refused_before_the_text_is_prepared(wrong, said, settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "model.student.config": {**NARROW, **wrong}}
    own |= {"data.cache_dir": str(tmp_path / "cache"), "data.tokenizer": "train", "model.optim.warmup_steps": 999}
    assert run(["fit", *arguments(settings, own)]) == 2
    assert re.search(rf"^error: --model.optim.warmup_steps 999 .*; --model.student.config.*{said}", error_of(capsys))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("callbacks", [0, [0], ["LearningRateMonitor", 0]], ids=str)
def test_what_a_class_refuses_is_told_with_its_setting_and_all_else(callbacks, settings, tmp_path, capsys):
    early = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/ce", "mode": "foo"}}
    given = early if callbacks == 0 else [each or early for each in callbacks]
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.callbacks": given, "data.block_size": 1}
    assert run(["fit", *arguments(settings, own)]) == 2
    assert error_of(capsys).startswith(
        "error: --trainer.callbacks EarlyStopping: `mode` can be min, max, got foo; --data.block_size: 1 must be"
    )


LSF = {"class_path": "LSFEnvironment"}


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("logger", [{"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}, "MLFlowLogger"], "MLFlowLogger: Req"),
        ("plugins", LSF, "LSFEnvironment: Did not find"),
        ("plugins", ["LightningEnvironment", LSF], "LSFEnvironment: Did not find"),
        (
            "strategy",
            {"class_path": "DDPStrategy", "init_args": {"cluster_environment": LSF}},
            "LSFEnvironment: Did no",
        ),
    ],
    ids=["after another", "of several types", "of several types, after another", "within another"],
)
def test_the_class_that_cannot_be_made_is_named_with_the_cause_alone(name, given, said, settings, tmp_path, capsys):
    if name == "logger" and find_spec("mlflow"):
        pytest.skip("MLflow is installed")
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, f"trainer.{name}": given}
    assert run(["fit", *arguments(settings, own)]) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 1
    assert f"error: --trainer.{name} {said}" in told


def test_a_value_may_look_like_the_beginning_of_another_problem(settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.source": "none; --data.seed"}
    assert run(["fit", *arguments(settings, own)]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_of_two_classes_with_the_same_setting_the_one_with_the_value_is_named():
    said = "Parser key \"verbose\": Expected a <class 'bool'>. Got value: maybe"
    for other in ("true", "may", "be"):  # parts of the value, too
        given = [("trainer.logger.verbose", other), ("trainer.callbacks.verbose", "maybe"), ("kd.verbose", "maybe")]
        for order in (given, given[::-1]):
            assert explain(said, ["verbose"], order) == "--trainer.callbacks.verbose maybe must be true or false"


@pytest.mark.parametrize(
    ("bad", "said"),
    [("{a: [", " {a: ["), ("2020-99-99", " 2"), ("{2020-01-01: [{2020-01-02: 1}]}", ".2020-01-01: give a")],
)
def test_a_class_setting_that_yaml_cannot_read_hides_no_other_error(settings, tmp_path, capsys, bad, said):
    own = [f"--run={tmp_path}/run", f"--trainer.logger={bad}", "--kd.weight=x", "--data.block_size=y"]
    assert cli.main(["fit", *arguments(settings), *own]) == 2
    line = error_of(capsys)
    for each in (f"--trainer.logger{said}", "--kd.weight x must", "--data.block_size y must"):
        assert each in line


def test_a_size_that_a_mapping_after_it_would_replace_is_refused(settings, tmp_path, capsys):
    """jsonargparse would drop it, so that the family's default counted. After the mapping, it is added."""
    config = "--model.student.config"
    sizes = [f"{config}.hidden_size=64", f"{config}={{num_hidden_layers: 1}}", f"{config}.vocab_size=9"]
    assert cli.main(["fit", *arguments(settings, {"model.student.config": {}}), f"--run={tmp_path}/run", *sizes]) == 2
    dropped = f"{config}.hidden_size 64: the mapping {config} that follows replaces it; put hidden_size: 64 into that"
    said = error_of(capsys)
    assert said.startswith(f"error: {dropped}; ")
    assert "vocab_size" not in said
    whole = [sizes[0], "--model={student: {config: {num_hidden_layers: 1}}}"]
    assert cli.main(["fit", *arguments(settings, {"model.student.config": {}}), f"--run={tmp_path}/run", *whole]) == 2
    dropped = f"{config}.hidden_size 64: the mapping --model that follows replaces it; put hidden_size: 64 into its "
    assert error_of(capsys).startswith(f"error: {dropped}student.config")


def test_a_name_two_levels_within_a_mapping_is_refused_wherever_it_stands(settings, tmp_path, capsys):
    """jsonargparse makes text of its value, with which the model's code cannot compute."""
    config = "--model.student.config"
    sizes = [f"{config}.rope_parameters.rope_theta=5000", f"{config}.hidden_size=32"]
    own = {name: value for name, value in settings.items() if name != "model.student.config"}
    for words in (sizes, sizes[::-1]):
        assert cli.main(["fit", *arguments(own), f"--run={tmp_path}/run", *words]) == 2
        said = (
            f"error: {config}.rope_parameters.rope_theta 5000: a dotted name sets only the first level of a mapping; "
        )
        assert error_of(capsys).startswith(said)


def test_a_refused_start_leaves_no_folders(settings, tmp_path):
    own = {"run": str(tmp_path / "new/deep/er"), "kd.steps": -1}
    assert run(["fit", *arguments(settings, own)]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("setting", ["run", "checkpoint.folder"])
def test_a_link_to_nothing_is_refused_before_training(setting, settings, tmp_path, capsys):
    """Else the first save fails. A scratch disk may have lost what it leads to."""
    (tmp_path / "run").mkdir()
    place = tmp_path / ("run/checkpoints" if setting == "run" else "link")
    place.symlink_to(tmp_path / "lost")
    given = {"run": str(tmp_path / "run"), "kd.weight": 0.0}
    given |= {} if setting == "run" else {setting: str(place / "mine")}
    assert run(["fit", *arguments(settings, given)]) == 2
    said = f"error: --{setting} {given[setting]}: {place} is a link that leads to no folder; choose another folder"
    assert error_of(capsys) == said


def test_what_needs_no_text_is_refused_before_it_all_at_once(settings, teacher, tmp_path, capsys):
    wrong = {
        "kd.steps": 50, "model.optim.warmup_steps": 50, "trainer.gradient_clip_algorithm": "value",
        "data.micro_batch_size": 5,
    }  # fmt: skip
    told = [
        "--kd.steps 50 is larger", "--model.optim.warmup_steps 50", "--trainer.gradient_clip_algorithm value",
        "rows do not divide into micro-batches of 5",
    ]  # fmt: skip
    own = {"run": str(tmp_path / "run"), "data.cache_dir": str(tmp_path / "cache"), "model.teacher.path": teacher}
    for key, said in zip(wrong, told, strict=True):
        assert cli.main(["fit", *arguments(settings, own, {key: wrong[key]})]) == 2
        assert said in capsys.readouterr().err
    late = {"kd.steps": 4, "kd.stop_margin": 0.1}  # the first validation is later
    for interval in ({"trainer.val_check_interval": 4}, {"trainer.val_check_interval": 0.5}):
        assert cli.main(["fit", *arguments(settings, own, late, interval)]) == 2
        assert "there is no validation before step 4" in capsys.readouterr().err
    more = {"data.source": "no/*.txt", "model.teacher.path": MISSING}
    assert cli.main(["fit", *arguments(settings, own, wrong, more)]) == 2
    error = capsys.readouterr().err
    assert [said for said in (*told, "matches no file", f"{MISSING} does not exist") if said not in error] == []
    assert not (tmp_path / "cache").exists()


def race(run: Path, inside: Path, end_s: float, counts) -> None:
    turns = bad = 0
    while time.time() < end_s:
        with suppress(ConfigError), run_lock.held(run):
            turns += 1
            try:
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                os.unlink(inside)
            except OSError:
                bad += 1
    counts.put((turns, bad))


@pytest.mark.parametrize("name", ["new", "stays"])
def test_one_fit_at_a_time_where_folders_come_and_go(tmp_path, name):
    """Real processes that take and release a run folder: never two at once."""
    (tmp_path / "stays").mkdir()
    fork = multiprocessing.get_context("fork")
    counts, args = fork.Queue(), (tmp_path / name, tmp_path / "inside", time.time() + 4)
    racers = [fork.Process(target=race, args=(*args, counts)) for _ in range(3)]
    for racer in racers:
        racer.start()
    found = [counts.get(timeout=60) for _ in racers]
    assert [bad for _, bad in found] == [0, 0, 0]
    assert sum(turns > 0 for turns, _ in found) > 1, found  # on a busy machine one may be too late
    for racer in racers:
        racer.join()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            {"model.student.path": "./nowhere", "kd.weight": 0.5, "model.teacher.path": "./nobody"},
            r"--model.student.path ./nowhere does not exist; .*--model.teacher.path ./nobody does not exist; ",
        ),
        ({"data.val_source": "no/*.txt"}, r"--data.val_source: 'no/\*.txt' matches no file; "),
        ({"data.test_source": "no/*.txt"}, r"--data.test_source: 'no/\*.txt' matches no file; "),
    ],
)
def test_what_is_not_there_is_told_before_text_is_prepared(own, says, settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.cache_dir": str(tmp_path / "cache"), **own}
    assert run(["fit", *arguments(settings, own)]) == 2
    assert re.search(says, error_of(capsys))
    assert not list(tmp_path.glob("cache/*"))


def test_a_folder_of_both_kinds_says_which(settings, tmp_path, capsys):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.source": str(tmp_path)}
    assert run(["fit", *arguments(settings, own)]) == 2
    assert (
        f"{tmp_path} holds .jsonl files but more plain text files; choose with a glob, e.g. {tmp_path}/*.jsonl"
        in error_of(capsys)
    )


def test_a_model_larger_than_the_memory_is_out_of_memory(settings, tmp_path, capsys):
    huge = {"model.student.config": {**NARROW, "intermediate_size": 10**13}}  # beyond any address space
    assert run(["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0}, huge)]) == 1
    assert "error: out of memory (" in error_of(capsys)


def test_a_card_that_this_torch_has_no_code_for(settings, tmp_path, capsys, monkeypatch):
    def launch(*args):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSearch for it in ...")

    monkeypatch.setattr(SALTModule, "training_step", launch)
    assert run(["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})]) == 1
    assert "error: this torch build does not support this GPU (CUDA error: no kernel image is available" in error_of(
        capsys
    )


@pytest.mark.parametrize(
    ("kind", "message", "said"),
    [
        (
            RuntimeError,
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space",
            "/dev/shm is too small (",
        ),
        (RuntimeError, "can't start new thread", "the limit of threads is reached (ulimit -u, or the pids limit of a"),
        (
            CppCompileError,
            "cannot write PCH file: No space left on device",
            "torch.compile has no room for the code that",
        ),
        (CppCompileError, "x.so: failed to map segment from shared object", "its folder is mounted noexec; set TORCHI"),
    ],
)
def test_what_fills_up_outside_the_run_is_named(settings, tmp_path, capsys, monkeypatch, kind, message, said):
    def fill(*args):
        raise kind(["g++"], message) if kind is CppCompileError else kind(message)

    monkeypatch.setattr(SALTModule, "training_step", fill)
    assert run(["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0})]) == 1
    line = error_of(capsys)
    assert said in line
    assert "--ckpt_path last" in line


def test_compiling_into_a_folder_whose_code_cannot_run_is_refused(settings, tmp_path, capsys, monkeypatch):
    """As Docker mounts a tmpfs. The folder itself need not be there yet."""
    (tmp_path / "mounted").mkdir()
    real = os.statvfs
    noexec = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: noexec if path == tmp_path / "mounted" else real(path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mounted/new"))
    own = {"run": str(tmp_path / "run"), "model.compile": True, "kd.weight": 0.0}
    assert run(["fit", *arguments(settings, own)]) == 2
    said = f"--model.compile true writes code into {tmp_path}/mounted/new, which is mounted noexec; set TORCHINDUCTOR_C"
    assert said in error_of(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["fit", "check", "validate", "predict"])
def test_compiling_without_a_compiler_is_refused(settings, teacher, tmp_path, capsys, monkeypatch, verb):
    monkeypatch.setenv("PATH", str(tmp_path))
    own = {"run": str(tmp_path / "run"), "model.compile": True}
    if verb in ("fit", "check"):
        own |= settings | {"kd.weight": 0.0}
    else:
        own |= {key: value for key, value in settings.items() if key.startswith(("data.", "trainer."))}
        own |= {"model.teacher.path" if verb == "predict" else "ckpt_path": teacher}
    assert run([verb, *arguments(own)]) == (1 if verb == "check" else 2)
    seen = capsys.readouterr()
    assert "--model.compile true needs a compiler, g++, and finds none; install it" in " ".join(
        (seen.out + seen.err).split()
    )


@pytest.mark.parametrize(
    ("device", "there", "variables", "refused"),
    [
        ("cpu", "g++", {}, None),
        ("cpu", "clang++", {"cxx": (None, "clang++")}, None),
        ("cpu", "g++", {"cxx": "icpx"}, "icpx"),
        ("cpu", "", {"TORCH_INDUCTOR_INSTALL_GXX": "1"}, None),  # torch installs one
        ("cuda", "clang", {}, None),
        ("cuda", "g++", {}, "gcc or clang"),
        ("cuda", "gcc", {"CC": "icx"}, "icx"),
        ("cuda", "nothing", {}, None),  # another machine's
        ("mps", "", {}, None),
    ],
)
def test_each_device_needs_its_own_compiler(tmp_path, monkeypatch, device, there, variables, refused):
    (tmp_path / (there or "nothing")).touch(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there != "nothing")
    for name, value in {"PATH": str(tmp_path), "CC": "", **variables}.items():
        if name != "cxx":
            monkeypatch.setenv(name, value)
    expected = pytest.raises(ConfigError, match=f"needs a compiler, {refused}, and") if refused else nullcontext()
    cxx = variables.get("cxx", (None, "g++"))  # which torch takes from CXX when it is imported
    with expected, inductor.patch({"cpp.cxx": cxx}):
        require(SALTModule(ModelSpec(), compile=True), device)
    require(SALTModule(ModelSpec(), compile=False), device)


CLASS = "give a class as class_path: NAME, with its settings below init_args"
CONFIGS = {
    "missing": (None, r"--config .*c.yaml does not exist; give a YAML file"),
    "no UTF-8": (b"\xff\xfe\x00", r"--config .*c.yaml is not UTF-8 text"),
    "a checkpoint": (b"PK\x03\x04\x00", r"--config .*c.yaml: not valid YAML"),
    "a tab": (b"model:\n\tcompile: true\n", r"--config .*c.yaml, line 2, column 1: not valid YAML \(found character"),
    "a glob without quotes": (
        b"data: {source: [a.txt, *.jsonl]}\n",
        r"--config .*c.yaml, line 1, column 25: not valid YAML \([^;]*\); put a value that begins with \* in quotes$",
    ),
    "no space after a colon": (b"kd:\n  weight:0.5\n", r"--kd weight:0.5 must be [^;]*; put a space after each colon;"),
    "classes as in Python and as in other tools": (
        b"trainer: {callbacks: [LearningRateMonitor(), EarlyStopping], logger: wandb}\n",
        r"--trainer.callbacks \['LearningRateMonitor\(\)', 'EarlyStopping'\] must be Callback or null; give a class as "
        r"class_path: LearningRateMonitor, with its settings below init_args; --trainer.logger wandb must be Logger or "
        r"true or false or null; no class wandb is installed; give one such as WandbLogger, or its full name, package",
    ),
    "a keyword that a class does not take": (
        b"trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: x}, dict_kwargs: {a: 1}}}\n",
        r"error: --trainer.logger CSVLogger: CSVLogger.__init__\(\) got an unexpected keyword argument 'a'; --data",
    ),
    "text with colons for groups": (
        b"data: a:b:c\nmodel: {teacher: org:x}\nkd: '{weight:1}'\n",
        r"error: --data a:b:c must be [^;]*; for files, a folder or a hub data set, use --data.source; [^;]*; "
        r"--model.teacher org:x must be [^;]*; for a checkpoint, a folder or a hub name, use --model.teacher.path; "
        r"--kd {weight:1} must be [^;]*; put a space after each colon; --trainer",
    ),
    "text for groups": (
        b"model: gpt2\ndata: my.jsonl\n",
        r"error: --model gpt2 must be [^;]*; for a checkpoint, a folder or a hub name, use --model.student.path; [^;]*"
        r"; --data my.jsonl must be [^;]*; for files, a folder or a hub data set, use --data.source; classes of ",
    ),
    "text that YAML takes for numbers and false": (
        b"run: 001\nmodel: {teacher: {revision: 123456}}\ndata: {subset: no}\n",
        r"error: --run 1 must be text; in a file, put it in quotes; --data.subset false must be text or null; in a "
        r"file, put it in quotes, or give null for none; "
        r"--model.teacher.revision 123456 must be text or null; in a file, put it in quotes; ",
    ),
    "texts that YAML takes for true and false": (
        b"answers: {choices: [yes, no]}\n",
        r"error: --answers.choices \[True, False\] must be null or a list of texts; put each entry in quotes",
    ),
    "a duration that is a number": (
        b"trainer: {max_time: 90}\n",
        r"error: --trainer.max_time 90 must be DD:HH:MM:SS in quotes, a mapping such as \{hours: 12\}, or null",
    ),
    "numbers that YAML takes for others": (
        b"trainer: {max_steps: 010, max_time: 1:12:00:00, min_steps: 0x10}\nmodel: {teacher: {revision: '0123456'}}\n"
        b"checkpoint: {at_steps: [1, 007, 0_12]}\nrun: 12:34\ndata: {subset: 00:12:00:00, split: !!str 010}\n",
        "error: --config c.yaml, line 1: 010 reads as 8 in YAML; write a number without colons or zeros before it, and "
        r"text in quotes; --config c.yaml, line 1: 1:12:00:00 reads as 259200 [^;]*; [^;]*; --config c.yaml, line 3: "
        r"0_12 reads as 10 [^;]*; [^;]*; --config c.yaml, line 4: 12:34 reads as 754 in YAML; [^;]* quotes$",
    ),
    "an open bracket": (b"model: [1, 2\n", r"--config .*c.yaml, line 2, column 1: not valid YAML"),
    "a list": (b"- 1\n", r"--config .*c.yaml is not a mapping of settings"),
    "nothing": (b"# run: x\n", r"--config .*c.yaml is not a mapping of settings; write lines such as"),
    "a word": (b"hello\n", r"--config .*c.yaml is not a mapping of settings"),
    "a tag": (
        b"model: !!python/object/apply:os.system ['touch ran']\n",
        r"--config .*c.yaml, line 1, column 8: tags such as !!python/object/apply:os.system are not supported; remove",
    ),
    "a value that is not what its tag says": (b"run: !!int x\n", r"--config .*c.yaml: not valid YAML \(invalid lit"),
    "a day that there is not": (b"run: 2024-13-45\n", r"--config .*c.yaml: not valid YAML \(month must be in 1"),
    "a key twice": (
        b"kd:\n  weight: 0\nrun: x\nkd:\n  steps: 1\n",
        r"--config .*c.yaml, line 4: kd is set twice",
    ),
    "no seed": (b"seed_everything: null\n", r"--seed_everything null must be a whole number from 0 to 4294967295"),
    "a key in dots besides": (
        b"data:\n  block_size: 7\ndata.block_size: 9\n",
        r"--config .*c.yaml, line 3: data.block_size is set twice; remove one",
    ),
    "a key in dots beside its group": (
        b"model:\n  student.config.hidden_size: 8\n  student: {config: {num_hidden_layers: 2}}\n",
        r"--config .*c.yaml, line 2: model.student.config.hidden_size is given in addition to the mapping "
        r"model.student; move it",
    ),
    "sizes in dots": (
        b"model.student.config.hidden_size: 8\nkd.weight: x\n",
        r"error: --kd.weight x must be a finite number; --model.student.config.hidden_size: in a file, indent "
        "hidden_size below config:, instead of joining them by a dot; --data.source: ",
    ),
    "a key beside two merges": (  # the later one wins
        b"trainer:\n  <<: {max_steps: 3}\n  <<: {max_steps: 4}\n  max_stps: 1\n",
        r"trainer.max_stps: there is no such setting",
    ),
    "a group left empty": (
        b"model:\n",
        r"--config .*c.yaml, line 1: model is empty; indent its settings below it, or remove it",
    ),
    "a group of callbacks left empty": (b"answers:\n", r"--config .*c.yaml, line 1: answers is empty; indent"),
    "sizes left empty": (
        b"model: {student: {config: }}\n",
        r"--model.student.config null must be a mapping of its settings; leave it out for the defaults",
    ),
    "null where a value must be": (
        b"run:\ntrainer: {max_steps: , devices: , callbacks: }\nmodel: {student: {family: }}\nkd: {steps: }\n",
        r"error: --trainer.devices null must be text or a [^;]*; --trainer.max_steps null must be a whole number; "
        r"--model.student.family null must be text; --run null must be text; --data.source",
    ),
    "several groups of others left empty": (
        b"model: {teacher: , optim: }\ndata: {keep: }\n",
        r"error: --model.teacher null must be a mapping [^;]*; [^;]*; --model.optim null must be a mapping [^;]*; "
        r"[^;]*; --data.keep null must be a mapping [^;]*; leave it out for the defaults$",
    ),
    "a list for a group": (b"data: [1]\n", r"--data .*must be a mapping of its settings"),
    "a misspelt key": (
        b"modle: {compile: true}\n",
        r"--modle.compile: there is no such setting; did you mean --model.com",
    ),
    "misspelt groups with nothing in them": (
        b"modle: {}\nmodel:\n  student: {config: {rope_parameters: {}}}\n  otpim: {}\n"
        b"trainer:\n  logger: {}\n  lgoger:\n",
        r"error: --modle: there is no such setting; did you mean --model\?; --model.otpim: there is no such setting; "
        r"did you mean --model.optim\?; --trainer.lgoger: there is no such setting; did you mean --trainer.logger\?; ",
    ),
    "a misspelt group alone": (b"modle:\n", r"--modle: there is no such setting; did you mean --model\?"),
    "settings beside the name of their class": (
        b"trainer: {callbacks: [DeviceStatsMonitor, {class_path: EarlyStopping, monitor: x, init_args: {}, mode: y}],\n"
        b"logger: {class_path: CSVLogger, save_dir: x}, plugins: {class_path: SLURMEnvironment, init_args: {}}}\n",
        rf"error: --trainer.callbacks.monitor, --trainer.callbacks.mode: {CLASS}; --trainer.logger.save_dir: {CLASS}; "
        "--(?!trainer)",
    ),
    "settings beside the name of a class that is appended": (
        b"trainer: {callbacks+: [{class_path: EarlyStopping, monitor: x}], logger+: {class_path: CSVLogger, dir: x}}\n",
        rf"error: --trainer.callbacks.monitor: {CLASS}; --trainer.logger.dir: {CLASS}; --(?!trainer)",
    ),
    "a list set and appended to": (
        b"trainer:\n  callbacks: [EarlyStopping]\n  callbacks+: [Timer]\n",
        r"error: --config c.yaml, line 3: trainer.callbacks and trainer.callbacks\+ are both set; put all into one of",
    ),
    "settings without a class": (
        b"trainer: {callbacks: {EarlyStopping: {monitor: x}}, strategy: {init_args: {replicas: 2}}, plugins: {x: 1}}\n",
        rf"error: --trainer.callbacks.EarlyStopping: {CLASS}; --trainer.plugins.x: {CLASS}; --trainer.strategy: "
        rf"{CLASS}; --(?!trainer)",
    ),
    "settings of a class that are no mapping": (
        b"trainer: {callbacks: [{class_path: EarlyStopping, init_args: [monitor]}],\n"
        b"strategy: {class_path: DDPStrategy, init_args: }}\n",
        r"error: --trainer.callbacks.init_args \['monitor'\] must be a mapping of the settings of EarlyStopping; "
        r"--trainer.strategy.init_args null must be a mapping of the settings of DDPStrategy; --(?!trainer)",
    ),
    "a class inside another without its name": (
        b"trainer: {strategy: {class_path: DDPStrategy, init_args: {precision_plugin: {device: 1}}}}\n",
        rf"error: --trainer.strategy.init_args.precision_plugin.device: {CLASS}",
    ),
    "settings beside the name of a class inside another": (
        b"trainer:\n  strategy: {class_path: DDPStrategy, init_args: {\n"
        b"    precision_plugin: {class_path: Precision, x: 1}}}\n",
        rf"error: --trainer.strategy.init_args.precision_plugin.x: {CLASS}",
    ),
    "a misspelt class inside another": (
        b"trainer: {strategy: {class_path: DDPStrategy, init_args: {precision_plugin: {class_path: Precisoin}}}}\n",
        r"error: --trainer.strategy.init_args.precision_plugin {'class_path': 'Precisoin'} must be Precision or null; "
        r"no class Precisoin is installed",
    ),
    "misspelt classes": (
        b"trainer: {callbacks: [{class_path: EarlyStoping}], logger: {class_path: no.such.Logger}}\n",
        r"error: --trainer.callbacks \[{'class_path': 'EarlyStoping'}\] must be Callback or null; no class "
        r"EarlyStoping is installed; give its full name, package.module.Class; --trainer.logger {'class_path': "
        r"'no.such.Logger'} must be Logger or true or false or null: No module named 'no'; --(?!trainer)",
    ),
    "names of another tool, one of them empty": (
        b"wandb_project:\nlearning_rate: 1\nkd: {weight: x}\n",
        r"error: --wandb_project: there is [^;]*; use [^;]*; --kd.weight x must [^;]*; --learning_rate: there is no",
    ),
    "several problems": (
        b"data:\nmodle:\nrun: x\nrun: y\n",
        r"error: --config c.yaml, line 1: data is empty; .*; --config c.yaml, line 4: run is set twice; remove one; "
        r"--config other.yaml does not exist; give [^;]*; --modle: there is no such setting; did you mean --model\?$",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_file_is_an_error_that_names_it(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, message = CONFIGS[case]
    if content is not None:
        Path("c.yaml").write_bytes(content)
    assert run(["fit", "--config", "c.yaml", *(["--config", "other.yaml"] if case == "several problems" else [])]) == 2
    line = error_of(capsys)
    assert re.search(message.replace(".*c.yaml", "c.yaml"), line), line
    assert not Path("ran").exists()


def test_an_address_for_a_group_or_a_class_is_not_fetched(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("fsspec.open", lambda *args, **_: opened.append(args) or nullcontext())
    (tmp_path / "c.yaml").write_text("kd: https://127.0.0.1/kd.yaml\n")
    own = ["--model.teacher=s3://b/x.ckpt", "--trainer.logger=s3://b/x", "--trainer.strategy=gs://b"]
    assert run(["fit", f"--config={tmp_path}/c.yaml", *own]) == 2
    line = error_of(capsys)
    assert "use --model.teacher.path; " in line
    for said in ("--kd https://127.0.0.1/kd.yaml must", "logger s3://b/x must be", "strategy gs://b is not"):
        assert said in line
    assert opened == []


def test_settings_beside_a_class_that_a_command_line_appends(capsys):
    assert run(["fit", '--trainer.callbacks+={"class_path": "EarlyStopping", "monitor": "x"}']) == 2
    assert f"error: --trainer.callbacks.monitor: {CLASS}" in error_of(capsys)


def test_without_a_source_no_folder_is_searched_for_one(monkeypatch, capsys):
    corpus, sought = cli.SALTDataModule._corpus, []
    monkeypatch.setattr(cli.SALTDataModule, "_corpus", lambda data, name: sought.append(name) or corpus(data, name))
    assert run(["fit", "--kd.wieght=0", "--data.val_source=none.txt"]) == 2
    line = error_of(capsys)
    assert "--data.source: [] names no text" in line
    assert "'none.txt' matches no file" in line
    assert sought == ["val_source"]


def test_of_several_files_each_needs_its_option(tmp_path, capsys):
    (tmp_path / "a.yaml").touch()
    assert run(["fit", "--kd.weight", "0", str(tmp_path / "a.yaml")]) == 2
    assert error_of(capsys).endswith("/a.yaml; give each file as --config FILE")


def test_a_mapping_of_a_command_line_needs_quotes_and_spaces(capsys):
    for value in ("{hidden_size:8}", "{hidden_size:"):
        assert run(["fit", "--model.student.config", value]) == 2
        assert f"{value} must be a mapping, '{{NAME: VALUE, ...}}', in quotes and with" in error_of(capsys)


def test_a_value_in_braces_beside_a_wrong_setting_stays_as_typed(capsys):
    templates = ["--data.examples.prompt", "{q}", "--data.examples.response", "{a}", "--data.tokenizer", "a/b"]
    assert run(["fit", *templates, "--run", "x", "--data.source", "{gone}", "--trainer.max_steps", "x"]) == 2
    line = error_of(capsys)
    assert "--trainer.max_steps x must be a whole number" in line
    assert "data.examples" not in line
    assert "--data.source: '{gone}' matches no file" in line


@pytest.mark.parametrize("name", ["kd", "model.student.config"])
def test_a_date_that_does_not_exist_in_a_mapping_leaves_no_traceback(name, capsys):
    assert run(["fit", f"--{name}", "{weight: 2020-13-45}", "--trainer.max_steps", "x"]) == 2
    line = error_of(capsys)
    assert "--trainer.max_steps x must be a whole number" in line
    assert f"--{name}" in line


def test_a_negative_number_with_an_exponent_is_a_value(capsys):
    assert run(["fit", "--kd.weight", "-1e-3", "--kd.stop_margin", "-1.5E-3", "--model.optim.lr", "-.5"]) == 2
    line = error_of(capsys)
    assert "--kd.weight -0.001 must" in line
    assert "--model.optim.lr -0.5 must" in line
    assert "stop_margin" not in line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{run: x", r"--config {run: x, line 1, column 8: not valid YAML \(expected ',' or '}'"),
        ("{run: x, run: y}", r"--config {run: x, run: y}, line 1: run is set twice; remove one$"),
        ("{kd: }", r"--config {kd: }, line 1: kd is empty; indent"),
        ("~/c.yaml", r"--config .*c.yaml, line 1: kd is empty; indent"),
    ],
)
def test_settings_in_braces_and_files_at_home_are_read_as_others(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("kd:\n")
    assert run(["fit", f"--config={given}"]) == 2
    assert re.search(said, line := error_of(capsys)), line


def test_a_config_file_that_can_be_read_only_once_is_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "typed")
    assert run(["fit", "--config", str(tmp_path / "typed")]) == 2
    assert re.search(r"--config .*typed is a pipe or a device, which cannot be read again; give a", error_of(capsys))
    assert run(["fit", "--model.teacher", str(tmp_path / "typed")]) == 2
    assert re.search(r"--model.teacher .*typed must be a mapping of its settings", error_of(capsys))


VERBS = {
    "no run": (["compare", "{bad}/folder"], r"compare: RUN .*folder: no TensorBoard event file with a value"),
    "a file for a run": (["compare", "{bad}/word.txt"], r"compare: RUN .*word.txt is not a folder"),
    "no checkpoint": (["export", "{bad}/word.txt", "out"], r"export: CKPT .*word.txt is not a whole checkpoint"),
    "a damaged checkpoint": (["export", "{bad}/flipped.ckpt", "out"], r"export: CKPT .*flipped.ckpt is damaged \(arc"),
    "a target that is there": (
        ["export", "{bad}/flipped.ckpt", "{bad}/folder"],
        r"export: DIR .*folder exists already",
    ),
    "an address": (["export", "{bad}/flipped.ckpt", "s3://bucket/out"], r"export: DIR s3:/bucket/out is an address"),
    "the home of nobody": (
        ["export", "{bad}/flipped.ckpt", "~nobody-here/x"],
        r"export: DIR ~nobody-here/x begins with",
    ),
    "a run in the home of nobody": (["compare", "~nobody-here/x"], r"compare: RUN ~nobody-here/x is not a folder"),
    "a name of bytes that are no text": (
        ["export", "{bad}/flipped.ckpt", "\udce9"],
        r"export: \\udce9 is not valid UTF-8; give another name$",
    ),
    "no verb": (["fti"], r"invalid choice: 'fti'"),
    "a misspelt --config": (["fit", "--cofnig=c.yaml"], r"--cofnig: there is [^;]*; did you mean --config\?$"),
    "nothing": ([], r"error: a verb comes first, one of fit, validate, test, predict, compare, export, check; then it"),
    "settings without a verb": (["--kd.weight=0"], r"error: a verb comes first, one of fit, [^;]*; then its settings$"),
    "settings before the verb": (["--kd.weight", "0", "fit"], r"error: a verb comes first, one of fit, "),
}


@pytest.mark.parametrize("case", VERBS)
def test_bad_arguments_of_other_verbs_are_one_line(case, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args, message = VERBS[case]
    assert run([arg.replace("{bad}", str(bad)) for arg in args]) == 2
    line = error_of(capsys)
    assert re.search(message, line), line
    assert not Path("out").exists()


# --- what happens while a run is under way ---


@pytest.mark.parametrize("rank", ["", "x", "-1", "1.0"])
def test_a_rank_that_is_no_number_is_one_line_before_the_imports(rank, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "")  # nobody reads it
    assert start() == 2
    assert error_of(capsys).startswith(f"error: LOCAL_RANK '{rank}' in the environment is no rank (0, 1, ...)")


@pytest.mark.parametrize("which", ["for temporary files", "of torch's compiler"])
def test_no_folder_to_write_to_at_the_imports_is_one_line(which):
    code = "import sys, tempfile; from salt_lightning.__main__ import main"
    env, said = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"}, "No such file or directory: '/proc/nowhere'"
    if which == "for temporary files":
        code, said = (
            f"{code}; tempfile._candidate_tempdir_list = lambda: []",
            "No usable temporary directory found in []",
        )
        del env["TORCHINDUCTOR_CACHE_DIR"]
    command = [sys.executable, "-c", f"{code}; sys.exit(main())", "fit"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stderr == (
        f"error: [Errno 2] {said}; set TMPDIR (and TORCHINDUCTOR_CACHE_DIR, if you use it) to a folder that can "
        "be written\n"
    )
    assert done.returncode == 2


def limited(args: list[str], largest_file: int) -> subprocess.CompletedProcess:
    """Runs the command in a process that cannot write larger files than this: it acts like a full disk."""
    code = f"""if True:
        import resource, sys
        from salt_lightning.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file}, {largest_file}))
        sys.exit(main())
    """
    return forked.run([sys.executable, "-c", code, *args])


@pytest.mark.parametrize(
    ("own", "largest_file", "message"),
    [
        (
            {"trainer.max_steps": 100, "checkpoint.every_n_steps": None},
            12_000,
            r"error: .*/run cannot be written \(.*File too large\); fix that and continue with --ckpt_path last",
        ),
        ({"checkpoint.every_n_steps": 2}, 60_000, r"error: .*/step-00000002.ckpt cannot be written \(.*File too large"),
    ],
    ids=["a log", "a checkpoint"],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_it(settings, tmp_path, own, largest_file, message):
    args = ["fit", *arguments(settings, {"run": str(tmp_path / "run"), "kd.weight": 0.0, "checkpoint.every_n_steps": 5},
                              {"trainer.val_check_interval": 100}, own)]  # fmt: skip
    assert cli.main(["fit", *arguments(settings, {"run": str(tmp_path / "first"), "kd.weight": 0.0})]) == 0  # the cache
    done = limited(args, largest_file)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert not list(tmp_path.glob("run/checkpoints/.*.tmp"))
    assert run([*args, "--ckpt_path=last", "--trainer.max_steps=12"]) == 0


def test_a_run_that_a_full_disk_does_not_begin(tmp_path):
    def hold() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        said = rf"^{tmp_path}/run/.lock cannot be written \(File too large\); fix that and try again$"
        with pytest.raises(OSError, match=said), run_lock.held(tmp_path / "run"):
            pass

    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("verb", "largest_file", "file", "remedy"),
    [
        ("predict", 300, "scores.json", "try again"),
        ("predict", 5_000, "scores/00000000.parquet", "run the same command again: finished shards are kept"),
        ("predict", 1_500, "report.*", "run the same command again: all shards are kept"),
        ("validate", 1_500, "validate/documents.parquet", "try again"),
    ],
)
def test_scores_that_a_full_disk_does_not_take(settings, teacher, tmp_path, verb, largest_file, file, remedy):
    own = {"run": str(tmp_path / "run"), "trainer.logger": False}
    if verb == "predict":
        names = ("source", "vocab_size", "block_size", "val_fraction", "cache_dir", "prepare_workers")
        settings = {f"data.{name}": settings[f"data.{name}"] for name in names}
        own |= {"model.teacher.path": teacher, "data.micro_batch_size": 8, "trainer.accelerator": "cpu"}
    else:
        own |= {"ckpt_path": teacher, "kd.weight": 0.0}
    if file == "report.*":  # smaller than the scores
        assert run([verb, *arguments(settings, own)]) == 0
    done = limited([verb, *arguments(settings, own)], largest_file)
    assert done.returncode == 1, done.stderr
    said = f"{tmp_path}/run/{file} cannot be written (File too large); fix that and {remedy}"
    assert done.stderr.splitlines()[-1] == f"error: {said}"
    assert run([verb, *arguments(settings, own)]) == 0


@pytest.mark.parametrize("lr", [1e30, 1e38], ids=["weights", "loss"])
def test_a_rate_far_too_large_is_one_line_and_no_bad_state_is_kept(settings, tmp_path, capsys, lr):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "model.optim.lr": lr, "checkpoint.every_n_steps": 1,
           "model.optim.warmup_steps": 0, "trainer.log_every_n_steps": 7}  # fmt: skip
    assert run(["fit", *arguments(settings, own)]) == 1
    line = error_of(capsys)
    assert re.search(
        r"(weights after|not finite at) step \d.*There is no checkpoint: start again, with a lower --model", line
    )
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert run(["fit", *arguments(settings, own, {"model.optim.lr": 1e-3})]) == 0  # in the same folder


@pytest.mark.parametrize("count", [1234567, 1234567.0])  # typing caches unions: what was imported decides
def test_a_count_is_named_as_typed(count):
    for name in ("limit_train_batches", "limit_val_batches"):
        (wrong,) = wrong_counts({name: count})
        assert re.match(f"--trainer.{name} 1234567,? ", wrong)


def test_a_folder_of_another_run_is_not_taken(settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0}
    assert run(["fit", *arguments(settings, own)]) == 0
    assert run(["fit", *arguments(settings, own)]) == 2
    assert "already contains a run; continue it with --ckpt_path last, or choose another folder" in error_of(capsys)
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert run(["fit", *arguments(settings, own, {"data.block_size": 16})]) == 2
    assert re.search(
        r"--run .*/run has the logs of another run, .*--data.block_size 32 \(here 16\); cho", error_of(capsys)
    )
    assert run(["fit", *arguments(settings, own, {"model.optim.lr": 1e-3})]) == 0  # the same run, begun again


def test_a_used_folder_hides_no_other_problem(settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    assert run(["fit", *arguments(settings, own)]) == 0
    wrong = {"trainer.precision": "16-true", "data.source": str(tmp_path / "none.jsonl"), "kd.weight": 0.5}
    assert run(["fit", *arguments(settings, own, wrong)]) == 2
    line = error_of(capsys)
    assert [re.search(rf"{problem}[^;]*(;|$)", line) is not None for problem in (
        "--trainer.precision 16-true must be", "already contains a run", "--kd.weight 0.5 needs a teacher",
        "none.jsonl' matches no file",
    )] == [True] * 4, line  # fmt: skip


def test_last_looks_where_the_checkpoints_are(settings, tmp_path, capsys):
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "checkpoint.folder": str(tmp_path / "elsewhere")}
    assert run(["fit", *arguments(settings, own)]) == 0
    assert run(["fit", *arguments(settings, own)]) == 2
    assert "already contains a run" in error_of(capsys)
    assert run(["fit", *arguments(settings, own, {"ckpt_path": "last"})]) == 0
    assert f"--ckpt_path last: {tmp_path / 'elsewhere' / 'step-00000012.ckpt'}" in capsys.readouterr().err
