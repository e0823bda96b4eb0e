"""A teacher with quantized weights. transformers' own quantizers need a GPU or large packages: four_bits.py is one."""

import re

import four_bits
import pytest
import ranks
import torch
from conftest import CLOCK, arguments, error_of, run, scalars
from families import tiny
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from salt_lightning.errors import ConfigError
from salt_lightning.export import export
from salt_lightning.flops import forward_flops_per_token, num_parameters
from salt_lightning.hugging_face import quantized
from salt_lightning.hugging_face.quantized import stored
from salt_lightning.teacher.scoring import weights_fingerprint


@pytest.fixture(scope="module")
def folders(teacher, tmp_path_factory):
    """The same weights twice: packed, and in full precision."""
    folder = tmp_path_factory.mktemp("quantized")
    export(teacher, folder / "trained")
    four_bits.quantize(folder / "trained", folder / "packed")
    model = AutoModelForCausalLM.from_pretrained(folder / "trained")
    for _, linear in four_bits.linears(model):
        pairs, scale = four_bits.packed(linear.weight.data)
        number = torch.stack([pairs % 16, pairs // 16], -1).flatten(1).float()
        linear.weight = nn.Parameter((number - 8) * scale)
    model.save_pretrained(folder / "whole")
    return folder


def taught_by(folder, **more):
    return {
        "model.teacher.path": str(folder),
        "kd.steps": 4,
        "trainer.max_steps": 6,
        "trainer.val_check_interval": 6,
    } | more


def test_a_packed_teacher_counts_as_what_it_holds(folders):
    packed, whole = (AutoModelForCausalLM.from_pretrained(folders / name) for name in ("packed", "whole"))
    assert sum(p.numel() for p in packed.parameters()) < num_parameters(packed) == num_parameters(whole)
    assert forward_flops_per_token(packed, 32) == forward_flops_per_token(whole, 32)
    assert (quantized.method(packed), quantized.method(whole)) == ("four_bits", None)


def test_it_teaches_as_its_weights_in_full_precision_do(folders, settings, tmp_path, caplog):
    for name in ("packed", "whole"):
        own = taught_by(folders / name, run=str(tmp_path / name))
        assert run(["fit", *arguments(settings, own)]) == 0
    assert "parameters in torch.float32, quantized (four_bits), loaded" in caplog.text
    packed, whole = (
        {tag: values for tag, values in scalars(tmp_path / name).items() if tag not in CLOCK}
        for name in ("packed", "whole")
    )
    assert packed.keys() == whole.keys() >= {"train/kd", "train/flops_teacher_total", "val/ce"}
    assert packed == whole


def test_sharded_training_gives_each_device_the_whole_of_it(folders, settings, tmp_path):
    """Packed weights cannot be split or sent; both processes load them."""
    shard = {"trainer.devices": 2, "trainer.strategy": "fsdp2", "data.micro_batch_size": 4}
    callback = {"trainer.callbacks": [{"class_path": "four_bits.Registered"}]}
    jobs = []
    for name in ("packed", "whole"):
        own = taught_by(folders / name, run=str(tmp_path / name)) | shard | callback
        jobs.append({"args": ["fit", *arguments(settings, own)], "spy": str(tmp_path / name)})
    ranks.launch(jobs, tmp_path)
    seen = {name: [torch.load(tmp_path / f"{name}.{rank}") for rank in range(2)] for name in ("packed", "whole")}
    assert all(of_rank["teacher_has_left"] for of_rank in [*seen["packed"], *seen["whole"]])
    for rank in range(2):
        for packed, whole in zip(*(seen[name][rank]["gradients"] for name in ("packed", "whole")), strict=True):
            torch.testing.assert_close(packed, whole)


def test_check_counts_its_memory_and_parameters(folders, settings, tmp_path, capsys):
    found = {}
    for name in ("packed", "whole"):
        own = taught_by(folders / name, run=str(tmp_path / name))
        assert run(["check", *arguments(settings, own)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        found[name] = re.search(r"(with the teacher .*?), frozen", said)[1], re.search(r"teacher ([\d.]+) MiB", said)[1]
    assert found["packed"][0] == found["whole"][0]
    files = (folders / name / "model.safetensors" for name in ("packed", "whole"))
    for (_, of_weights), file in zip(found.values(), files, strict=True):
        tensors = load_file(file).values()  # tied weights once, as in memory
        assert float(of_weights) == pytest.approx(sum(t.nbytes for t in tensors) / 2**20, rel=5e-3)  # three digits


def test_a_student_cannot_be_quantized(folders, settings, tmp_path, capsys):
    own = {"model.student.path": str(folders / "packed"), "model.student.config": {}, "kd.weight": 0.0}
    assert run(["fit", *arguments(settings, own, {"run": str(tmp_path / "run")})]) == 2
    assert "its weights are quantized (four_bits) and cannot be trained; give the model in full" in error_of(capsys)


def test_a_tensor_of_several_counts_as_all_of_them():
    """torchao's weights are integers with scales and zero points behind the face of one tensor, which has no bits."""
    lm, weight = tiny("llama"), torch.rand(3, 4)
    before, plain = quantized.num_bytes(lm.parameters()), weights_fingerprint(lm)
    for scale in (torch.ones(3, 4), torch.zeros(3, 4)):
        lm.model.both = nn.Parameter(TwoTensor(weight, TwoTensor(weight, scale)))
        assert [part.data_ptr() for part in stored(lm.model.both)] == [t.data_ptr() for t in (weight, weight, scale)]
        assert quantized.num_bytes(lm.parameters()) == before + 3 * 12 * 4
        before_this, plain = plain, weights_fingerprint(lm)
        assert plain != before_this
        lm.check()
    scale[1, 2] = torch.nan
    with pytest.raises(ConfigError, match=r"its weights are not finite \(both\)"):
        lm.check()
