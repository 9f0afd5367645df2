"""`from_pretrained` on the reference's own weights of both generations, as files whose keywords nobody told."""

import pytest
import torch
from safetensors.torch import save_file
from test_reference_weights import of, read

from palm_rlhf_pytorch import PaLM

UNTOLD = ("causal", "rotary_xpos_scale_base", "cross_entropy_ignore_index")  # no shape tells these


@torch.no_grad()
@of("palm_")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "-legacy.pt"])
def test_told_by_shapes_and_gammas(tmp_path, file, suffix, said):
    config, state, data = read(file)
    if suffix == ".safetensors":
        save_file(state, tmp_path / "palm.safetensors")
    else:
        torch.save(state, tmp_path / f"palm{suffix}", _use_new_zipfile_serialization=suffix == ".pt")
    told = {name: config[name] for name in UNTOLD if name in config}
    palm = PaLM.from_pretrained(tmp_path / f"palm{suffix}", **told)
    assert f"generation {file.parent.name.removeprefix('v')}" in said()[0] and len(said()) == 1
    scopes = {"logits": None, "logits_base": None, "logits_actor": "actor", "logits_critic": "critic"}
    found = {name: palm(data["tokens"], finetune_scope=scope) for name, scope in scopes.items() if name in data}
    assert len(found) == (3 if palm.finetune_modules else 1)
    for name, logits in found.items():
        torch.testing.assert_close(logits, data[name], atol=1e-4, rtol=1e-4)
    palm.save_pretrained(tmp_path / "ours")  # from here on it is known
    assert (
        torch.equal(PaLM.from_pretrained(tmp_path / "ours")(data["tokens"]), palm(data["tokens"])) and len(said()) == 1
    )
