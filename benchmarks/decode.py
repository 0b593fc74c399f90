"""How fast a batch of prompts is answered, against textbook decoding one prompt at a time.

    python -m benchmarks.decode                        GPT-2 124M with random weights, two threads
    python -m benchmarks.decode --model data/arithmetic_gpt2 --prompts 8      a quick look

The textbook decoder is that of the Coconut release: one prompt, and for every latent and every new token the
whole prefix again.  Both decode the same prompts to the same length (no answer ends early), and their tokens
are compared: random weights make near ties, so a rare difference in a late token is counted, not hidden.
"""

import argparse
import json
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from coconut_ds.data.batching import Batch
from coconut_ds.evaluation.saved_models import READING
from coconut_ds.model.coconut import Coconut
from coconut_ds.thoughts import ThoughtSettings, build_thought

NO_EOS = -1


def make_model(name: str) -> Coconut:
    config = GPT2Config() if name == "gpt2" else AutoConfig.from_pretrained(name)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    return Coconut(base, build_thought("last_hidden", config.hidden_size, ThoughtSettings()), READING).eval()


def make_batch(prompts: int, tokens: int, num_latents: int, vocabulary: int) -> Batch:
    """Random prompts of `tokens` tokens, the last of them <end>, with latent slots before it."""
    columns, latent_id, first = tokens + num_latents, vocabulary - 1, tokens - 1
    ids = torch.randint(0, latent_id, (prompts, columns), generator=torch.Generator().manual_seed(1))
    ids[:, first : first + num_latents] = latent_id
    mask = torch.ones_like(ids)
    positions = torch.arange(columns).repeat(prompts, 1)
    return Batch.from_padded(ids, mask, positions, torch.full_like(ids, -100), latent_id)


@torch.no_grad()
def textbook(model: Coconut, ids_T: torch.Tensor, first: int, num_latents: int, new_tokens: int) -> list[int]:
    """One prompt, the whole prefix again for every latent and every token."""
    lm = model.causal_lm
    embeds_1TD = lm.get_input_embeddings()(ids_T[None])
    for slot in range(first, first + num_latents):
        output = lm(inputs_embeds=embeds_1TD[:, :slot], use_cache=False, output_hidden_states=True)
        embeds_1TD[:, slot] = output.hidden_states[-1][:, -1]
    answer: list[int] = []
    for _ in range(new_tokens):
        token = lm(inputs_embeds=embeds_1TD, use_cache=False).logits[0, -1].argmax()
        answer.append(int(token))
        embeds_1TD = torch.cat([embeds_1TD, lm.get_input_embeddings()(token[None, None])], dim=1)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="gpt2", help="gpt2 (124M), or a folder with a config.json")
    parser.add_argument("--prompts", type=int, default=64, help="rows of the batch (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a prompt (default: 64)")
    parser.add_argument("--latents", type=int, default=6)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--one_by_one", type=int, default=3, help="textbook prompts (default: 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="batches timed, the median counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model(args.model)
    vocabulary = model.causal_lm.config.vocab_size
    batch = make_batch(args.prompts, args.tokens, args.latents, vocabulary)
    model.generate(batch, 2, NO_EOS)  # warm up
    batched_seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        answers = model.generate(batch, args.new_tokens, NO_EOS)
        batched_seconds.append((time.perf_counter() - started) / args.prompts)
    batched = sorted(batched_seconds)[len(batched_seconds) // 2]
    started = time.perf_counter()
    singles = [
        textbook(model, batch.input_ids_BT[row], batch.first_latent, args.latents, args.new_tokens)
        for row in range(args.one_by_one)
    ]
    single = (time.perf_counter() - started) / args.one_by_one
    pairs = zip(singles, answers[: args.one_by_one], strict=True)
    equal = sum(a == b for one, many in pairs for a, b in zip(one, many, strict=True))
    result = {
        "model": args.model,
        "parameters": sum(p.numel() for p in model.causal_lm.parameters()),
        "prompts": args.prompts,
        "threads": args.threads,
        "seconds_per_prompt_batched": batched,
        "seconds_per_prompt_one_by_one": single,
        "times_faster": single / batched,
        "equal_tokens": f"{equal} of {args.one_by_one * args.new_tokens}",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
