"""Evaluate checkpoints: accuracy with its interval, tokens and seconds per answer, and ablations.

    python -m coconut_ds eval RUN                                       the newest checkpoint of a run folder
    python -m coconut_ds eval RUN --checkpoint all --split test         every checkpoint, on test_path
    python -m coconut_ds eval RUN --checkpoint best_stage_1 best_stage_2     one table
    python -m coconut_ds eval RUN --ablate all                          do the latents matter?
    python -m coconut_ds eval RUN --num_samples 8 --latent_noise 0.1    pass@k and majority vote
    deepspeed --num_gpus 2 --module coconut_ds eval RUN                 the same numbers, twice as fast
    deepspeed --num_gpus 2 --module coconut_ds eval CONFIG --deepspeed_config JSON

RUN is a run folder, a checkpoint folder, or a folder written by `export`; it contains the settings and the
stage.  CONFIG is an experiment YAML: `load_model_path` names the weights, and `resume`, the number of epochs
they were trained for, determines the stage.  Evaluating at another stage needs --allow stage,
and --set of a setting that the weights were trained with needs --allow KEY.
Results are appended to evaluations.jsonl and predictions.jsonl in the run folder.

An ablation replaces the latents; accuracy is compared with the intact model on the same problems
(exact McNemar test):
  zero     zeros                                      shuffle  the same latents in another order
  mean     the mean over the batch, per latent        swap     the latents of another problem
  noise    random directions of the same norms        fewer    half as many latents       none   no latents
zero:2, mean:2, noise:2 and swap:2 replace only the second latent.

--num_samples K draws K answers to every problem and reports pass@1 (the mean), pass@2, pass@4 ... pass@K
(unbiased estimator of Chen et al. 2021) and the majority vote.  The same seed draws the same answers on any
number of ranks and with any batch size; --set seed=N --allow seed draws others.
"""

import argparse

from coconut_ds.config.deepspeed import add_ds_config_argument
from coconut_ds.config.experiment import add_allow_stage, add_overrides
from coconut_ds.files import json_text, open_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="RUN|CONFIG", help="run folder, checkpoint, exported folder or experiment YAML"
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="NAME",
        help="checkpoints of the run folder: names, latest (default), best, best_stage_N or all",
    )
    parser.add_argument(
        "--split", default="valid", metavar="NAME|FILE", help="valid (default), test, train or a file"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate only the first N problems")
    parser.add_argument("--latents", type=int, metavar="N", help="number of latents (default: as trained)")
    parser.add_argument(
        "--ablate", metavar="NAME,...", help="also evaluate these ablations (see above), or 'all'"
    )
    parser.add_argument(
        "--num_samples", type=int, metavar="K", help="also draw K answers: pass@k and majority vote"
    )
    parser.add_argument(
        "--latent_noise", type=float, metavar="S", help="Gaussian noise on the latents, standard deviation S"
    )
    parser.add_argument(
        "--latent_dropout", type=float, metavar="P", help="set components of the latents to 0 with this rate"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sample the text of the answer (default: greedy)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to FILE")
    add_ds_config_argument(parser, needed=False)
    add_allow_stage(parser)
    add_overrides(parser, "of the run")


def run(args: argparse.Namespace) -> int:
    from coconut_ds.evaluation.ablation import parse_ablations  # these import torch, as in train.py
    from coconut_ds.evaluation.measure import EvalOptions, measure
    from coconut_ds.evaluation.sampling import parse_sampling
    from coconut_ds.evaluation.saved_models import ds_config_of, find_trained
    from coconut_ds.memory.budget import read_ds_config

    sampling = parse_sampling(
        args.num_samples,
        latent_noise=args.latent_noise,
        latent_dropout=args.latent_dropout,
        temperature=args.temperature,
    )
    ablations = parse_ablations(args.ablate) if args.ablate else ()
    options = EvalOptions(args.split, args.limit, ablations, sampling)
    models = find_trained(args.target, args.checkpoint, args.overrides, args.latents, args.allow)
    folder = models[0].folder
    if args.deepspeed_config:
        ds_config = read_ds_config(args.deepspeed_config, models[0].experiment, args.ds_overrides)
        results = measure(models, ds_config, options)
    else:
        results = measure(
            models, ds_config_of(folder) if (folder / "ds_config.json").is_file() else None, options
        )
    if args.json and not args.local_rank:
        with open_output(args.json, "--json") as writer:
            writer.write(json_text([result.numbers() for result in results], indent=1) + "\n")
    return 0
