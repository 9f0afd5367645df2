"""What the reference's own README example costs in memory here.

Its sizes: dim 512, depth 12, 20,000 tokens, prompts of 512 tokens, max_seq_len 2,048, update_timesteps 5,000. The
reference keeps every token's distribution over the vocabulary for each of the 5,000 rollouts; ours keeps numbers.

    python benchmarks/readme_example.py              # the bytes, then a scaled-down run with measured peak memory
    python benchmarks/readme_example.py --prompts 8 --max-seq-len 640
"""

import argparse
import resource
import threading
import time

import torch

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer
from palm_rlhf_pytorch.experience import Experience

ROLLOUTS, LENGTH, VOCABULARY, PROMPT = 5000, 2048, 20000, 512


def experience_of(rollouts: int, length: int, device: str) -> Experience:
    """An Experience of that size with every field there; on the meta device it takes no memory."""

    def numbers() -> torch.Tensor:
        return torch.empty(rollouts, length, device=device)

    def bits() -> torch.Tensor:
        return torch.empty(rollouts, length, dtype=torch.bool, device=device)

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.long, device=device)

    return Experience(
        sequence=ids(rollouts, length),
        prompt_mask=bits(),
        response_mask=bits(),
        log_probs=numbers(),
        ref_log_probs=numbers(),
        scores=torch.empty(rollouts, device=device),
        finished=torch.empty(rollouts, dtype=torch.bool, device=device),
        group_ids=ids(rollouts),
        values=numbers(),
        advantages=numbers(),
        returns=numbers(),
    )


class PeakMemory:
    """Peak resident memory over what was there at the start, sampled; and the GPU's peak where there is one."""

    def __enter__(self) -> "PeakMemory":
        self.base = self.peak = resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=8, help="rollouts of the run (default: 8)")
    parser.add_argument("--max-seq-len", type=int, default=640, help="prompt and response (default: 640)")
    parser.add_argument("--minibatch-size", type=int, default=2, help="sequences learned from at once (default: 2)")
    options = parser.parse_args()

    ours = experience_of(ROLLOUTS, LENGTH, "meta").nbytes
    theirs = ROLLOUTS * LENGTH * VOCABULARY * 4
    print(f"{ROLLOUTS:,} rollouts of {LENGTH:,} tokens, vocabulary {VOCABULARY:,}")
    print(f"  the reference's stored distributions  {theirs / 1e9:10.1f} GB")
    print(f"  our Experience, every field           {ours / 1e9:10.3f} GB   ({theirs / ours:,.0f} times less)")

    torch.manual_seed(0)
    palm = PaLM(num_tokens=VOCABULARY, dim=512, depth=12, flash_attn=True)
    reward_model = RewardModel(palm, num_binned_output=5, use_lora=True)
    prompts = torch.randint(1, VOCABULARY, (50, PROMPT))
    trainer = RLHFTrainer(
        palm=palm, reward_model=reward_model, prompt_token_ids=prompts, minibatch_size=options.minibatch_size
    )
    weights = sum(p.nbytes for p in palm.parameters()) + sum(p.nbytes for p in reward_model.parameters())
    with PeakMemory() as memory:
        started = time.perf_counter()
        trainer.train(
            num_episodes=1,
            max_timesteps=options.prompts,
            update_timesteps=options.prompts,
            max_batch_size=options.prompts,
            max_seq_len=options.max_seq_len,
        )
        seconds = time.perf_counter() - started
    print(f"\n{options.prompts} prompts of {PROMPT} tokens answered up to {options.max_seq_len}, one PPO update")
    peak = memory.peak - memory.base
    print(f"  weights (one trunk for actor, critic, reference; the reward model's)  {weights / 1e9:6.3f} GB")
    print(f"  peak memory above them                                                {peak / 1e9:6.3f} GB")
    if torch.cuda.is_available():
        on_gpu = torch.cuda.max_memory_allocated()
        print(f"  peak on the GPU, weights included                                     {on_gpu / 1e9:6.3f} GB")
    print(f"  seconds                                                               {seconds:6.1f}")


if __name__ == "__main__":
    main()
