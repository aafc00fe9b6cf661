"""Run by a test in a process of its own, as nnU-Net reads its folders from the environment when it is imported.

``python nnunet_trial.py CHECKPOINT COMMAND TRAINER``: prepares and plans the data set 1 by nnU-Net's command for
pre-trained weights, trains two steps by its trainer, and saves the network as it was at the start to ``start.pt``.
"""

import os
import sys

import torch
from nnunetv2.experiment_planning import like_nnssl
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args


def run(entry, *words: str) -> None:
    """Call an entry point of nnU-Net as its command line would."""
    sys.argv = [entry.__name__, *words]
    entry()


def main(checkpoint: str, command: str, trainer_name: str) -> None:
    if command == "preprocess_like_nnssl":
        run(plan_and_preprocess_entry, "-d", "1", "--no_pp", "-np", "1", "-npfp", "1")
        given = ("-d", "1", "-n", "mim3d", "-pc", checkpoint, "-np", "1")
        run(like_nnssl.preprocess_like_nnssl_entrypoint, *given, "-am", "like_pretrained")
        plans = "ptPlans__mim3d____Spacing__1.50_1.00_1.00___Norm__Z"
    else:
        base = "nnUNetResEncUNetLPlans"
        run(plan_and_preprocess_entry, "-d", "1", "-pl", "nnUNetPlannerResEncL", "--no_pp", "-np", "1", "-npfp", "1")
        run(
            like_nnssl.plan_like_dynamic_entrypoint,
            "-d",
            "1",
            "-n",
            "mim3d",
            "-pc",
            checkpoint,
            "-pl",
            base,
            "-np",
            "1",
        )
        plans = "ptPlans_dynamic__mim3d"
    # Planning asks for a thread of its own, training may do without another process.
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    trainer = get_trainer_from_args("1", "3d_fullres", 0, trainer_name, plans, device=torch.device("cpu"))
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.num_epochs = 2, 1, 1
    trainer.initialize()
    network = trainer.network
    parts = (f"{network.key_to_encoder}.", f"{network.key_to_stem}.")
    start = {key: value.clone() for key, value in network.state_dict().items()}
    torch.save(start, "start.pt")
    trainer.run_training()
    after = trainer.network.state_dict()
    encoder = [key for key in start if key.startswith(parts)]
    print("TENSORS THAT LEARNED", sum(not torch.equal(after[key], start[key]) for key in encoder))
    if trainer_name == "PretrainedTrainer":
        # The way of releases, which asks for every tensor but those of the labels.
        load_pretrained_weights(trainer.network, checkpoint)
        again = trainer.network.state_dict()
        print("WHOLE", all(torch.equal(start[key], again[key]) for key in encoder))


if __name__ == "__main__":
    main(*sys.argv[1:4])
