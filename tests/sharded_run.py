"""Two real processes shard a student with FSDP2, train it for one step and save it as Lightning does: a file per rank.

python tests/sharded_run.py DIR writes DIR/step-00000001.ckpt/ and DIR/whole.pt, the same weights gathered.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning.pytorch as pl
import torch
from conftest import ALWAYS, add_table
from families import FAMILIES
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from salt_lightning.hugging_face.spec import ModelSpec, resolved
from salt_lightning.models import CausalLM, build_fresh

# Sizes that two ranks cannot divide evenly.
SIZES = {**FAMILIES["llama"], "vocab_size": 65, "intermediate_size": 45, "num_key_value_heads": 1, "head_dim": 2}
SPEC = ModelSpec(config={**SIZES, "max_position_embeddings": 16, "tie_word_embeddings": True})


class Student(pl.LightningModule):
    def configure_model(self):
        if hasattr(self, "student"):
            return
        self.student = CausalLM(build_fresh(SPEC, None, seed=0), "student")
        spec = resolved(replace(SPEC, path=None), self.student.model.config)
        self.save_hyperparameters({"student": asdict(spec)})
        mesh = self.device_mesh["data_parallel"]
        for layer in self.student.backbone.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.student, mesh=mesh)

    def on_save_checkpoint(self, checkpoint):
        checkpoint |= {name: value for name, value in ALWAYS.items() if name not in checkpoint}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.arange(16).view(2, 8), batch_size=1)

    def training_step(self, ids_BT):
        return self.student(ids_BT, torch.arange(8)[None], then=lambda h, w, b: (h @ w.T).square().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=1, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    module = Student()
    trainer.fit(module)
    trainer.save_checkpoint(out / "step-00000001.ckpt")
    if trainer.is_global_zero:  # as FSDP2 of this project does
        add_table(out / "step-00000001.ckpt")
    whole = get_model_state_dict(module.student.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_global_zero:
        torch.save(whole, out / "whole.pt")
    torch.distributed.barrier()  # gloo's threads may abort a rank whose peer is gone
    torch.distributed.destroy_process_group()
