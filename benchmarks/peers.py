"""Virtual environments of the libraries that the benchmarks compare with, under benchmarks/.venvs.

    python benchmarks/peers.py                       # all of them: 5 GB, some minutes
    python benchmarks/peers.py --only transformers   # one of them

What is there already, in the versions asked for, is left alone.
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

VENVS = Path(__file__).resolve().parent / ".venvs"
# installed first and by itself: pip takes the CPU build where it is on offer, and what follows leaves it alone
TORCH = "torch==2.13.0"
LISTING = "import importlib.metadata as m; [print(d.name.lower(), d.version) for d in m.distributions()]"


@dataclass(frozen=True)
class Peer:
    """One environment: what pip is asked for beside torch, which of it is the peer, and an import that must work."""

    packages: tuple[str, ...]
    imports: str


PEERS = {
    "transformers": Peer(("transformers>=5,<6",), "from transformers import CohereForCausalLM"),
    "reference": Peer(("PaLM-rlhf-pytorch==0.8.0",), "from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer"),
    "trl_ppo": Peer(("trl==1.12.*", "peft"), "from trl.experimental.ppo import PPOConfig, PPOTrainer"),
    "trl_grpo": Peer(("trl>=1.16,<2", "peft"), "from trl import GRPOConfig, GRPOTrainer"),
}


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return VENVS / name / "bin" / "python"


def recipe(name: str) -> str:
    """What the environment was made from; kept in it, so that a changed recipe makes it anew."""
    return "\n".join((TORCH, *PEERS[name].packages)) + "\n"


def ready(name: str) -> bool:
    """Whether the environment is there, whole, and made from today's recipe."""
    stamp = VENVS / name / "recipe.txt"
    return python_of(name).exists() and stamp.exists() and stamp.read_text() == recipe(name)


def versions(name: str) -> dict[str, str]:
    """Every package in the environment and its version, asked of the environment itself."""
    listed = call([str(python_of(name)), "-c", LISTING], f"{name} cannot list its packages")
    return dict(line.split() for line in listed.splitlines())


def call(command: list[str], failure: str) -> str:
    """Run a command; its output, or a one-sentence error that ends with its last line."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise SystemExit(f"{failure}: {last}")
    return done.stdout


def build(name: str, base_python: str) -> None:
    """Make one environment from nothing; it counts as there only once its import has worked."""
    shutil.rmtree(VENVS / name, ignore_errors=True)
    VENVS.mkdir(parents=True, exist_ok=True)
    call([base_python, "-m", "venv", str(VENVS / name)], f"{name}: {base_python} cannot make a virtual environment")
    for packages in ((TORCH,), PEERS[name].packages):
        print(f"{name}: pip install {' '.join(packages)}", flush=True)
        # torch again beside the others: pip may then not replace it
        wanted = list(dict.fromkeys((TORCH, *packages)))
        call([str(python_of(name)), "-m", "pip", "install", "--quiet", *wanted], f"{name}: pip failed")
    call([str(python_of(name)), "-c", PEERS[name].imports], f"{name}: installed, but `{PEERS[name].imports}` fails")
    (VENVS / name / "recipe.txt").write_text(recipe(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PEERS, help="make this environment and no other (default: all)")
    parser.add_argument("--python", default=sys.executable, help=f"the base interpreter (default: {sys.executable})")
    parser.add_argument("--rebuild", action="store_true", help="make anew what is there already")
    options = parser.parse_args()
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    for name in [options.only] if options.only else PEERS:
        if options.rebuild or not ready(name):
            build(name, options.python)
        shown = versions(name)
        mine = [p.split("=")[0].split(">")[0].lower() for p in (TORCH, *PEERS[name].packages)]
        print(f"{name}: ready, " + ", ".join(f"{p} {shown[p]}" for p in mine))


if __name__ == "__main__":
    main()
