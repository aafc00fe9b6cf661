"""Run by a test in a process of its own, as nnU-Net reads its folders from the environment when it is imported.

``python nnunet_trial.py CHECKPOINT COMMAND BASE_PLANS``: prepares and plans the data set 1 by nnU-Net's command for
pre-trained weights, trains two steps by its trainer, and saves the encoder as it was at the start to ``start.pt``.
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


def main(checkpoint: str, command: str) -> None:
    if command == "preprocess_like_nnssl":
        run(plan_and_preprocess_entry, "-d", "1", "--no_pp", "-np", "1", "-npfp", "1")
        given = ("-d", "1", "-n", "mim3d", "-pc", checkpoint, "-np", "1")
        run(like_nnssl.preprocess_like_nnssl_entrypoint, *given, "-am", "like_pretrained")
        plans, trainer_name = "ptPlans__mim3d____Spacing__1.50_1.00_1.00___Norm__Z", "PretrainedTrainer"
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
        plans, trainer_name = "ptPlans_dynamic__mim3d", "DynamicPretrainedTrainer"
    # Planning asks for a thread of its own, training may do without another process.
    os.environ["nnUNet_n_proc_DA"] = "0"  # noqa: SIM112
    trainer = get_trainer_from_args("1", "3d_fullres", 0, trainer_name, plans, device=torch.device("cpu"))
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch, trainer.num_epochs = 2, 1, 1
    trainer.initialize()
    start = {key: value.clone() for key, value in trainer.network.encoder.state_dict().items()}
    torch.save(start, "start.pt")
    trainer.run_training()
    moved = sum(not torch.equal(value, start[key]) for key, value in trainer.network.encoder.state_dict().items())
    print("TENSORS THAT LEARNED", moved)
    if command == "preprocess_like_nnssl":
        # The way of releases, which asks for every tensor but those of the labels.
        load_pretrained_weights(trainer.network, checkpoint)
        again = trainer.network.encoder.state_dict()
        print("WHOLE", all(torch.equal(value, again[key]) for key, value in start.items()))


if __name__ == "__main__":
    main(*sys.argv[1:3])
