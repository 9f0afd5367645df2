import pickle

import pytest
import torch

from palm_rlhf_pytorch.state import fingerprint, load_state, random_state, save_state, set_random_state

STATE = {"kind": "test", "weights": {"w": torch.arange(3.0)}, "history": [{"step": 1, "loss": 0.5}]}


def test_what_is_saved_is_loaded(tmp_path):
    save_state(tmp_path / "deep" / "state.pt", STATE)
    state = load_state(tmp_path / "deep" / "state.pt", "test")
    assert state["history"] == STATE["history"]
    assert torch.equal(state["weights"]["w"], torch.arange(3.0))


def test_a_crash_while_saving_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, STATE)

    def crash(state, temporary):
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        save_state(path, {"kind": "test"})
    assert load_state(path, "test")["history"] == STATE["history"]
    assert list(tmp_path.iterdir()) == [path]


def refused(path, error=ValueError):
    with pytest.raises(error) as caught:
        load_state(path, "test")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_half_a_state_is_refused_in_one_sentence(tmp_path, share):
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "not a whole checkpoint" in refused(path)


class Danger:
    def __reduce__(self):
        return print, ("executed",)


def test_code_in_a_state_is_never_run(tmp_path, capsys):
    path = tmp_path / "state.pt"
    torch.save({"kind": "test", "danger": Danger()}, path)
    assert "nothing in it was executed" in refused(path)
    path.write_bytes(pickle.dumps(Danger()))
    refused(path)
    assert "executed" not in capsys.readouterr().out


def test_foreign_states_are_refused(tmp_path):
    save_state(tmp_path / "other.pt", {**STATE, "kind": "other"})
    assert "no test checkpoint (it says 'other')" in refused(tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "(it says None)" in refused(tmp_path / "list.pt")
    assert "there is no checkpoint" in refused(tmp_path / "missing.pt", FileNotFoundError)


def test_fingerprint_sees_every_bit():
    tensors = [torch.zeros(2, 3), torch.ones(2, dtype=torch.bfloat16)]
    same = [t.clone() for t in tensors]
    assert fingerprint(tensors) == fingerprint(same)
    same[0][1, 2] = 1e-30
    assert fingerprint(tensors) != fingerprint(same)


def test_random_state_comes_back():
    state = random_state()
    drawn = torch.rand(3)
    torch.rand(5)
    set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)
