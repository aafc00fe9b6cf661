"""Whether every arm can run on this machine, asked before any work begins."""

from dataclasses import replace

from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.methods import Method
from mim3d.training.launch import check_machine
from mim3d.training.precision import require_precision
from mim3d.workflows.compare.arm_cells import finetuning_of, pretraining_of
from mim3d.workflows.compare.arms import Arm
from mim3d.workflows.compare.plan import ComparisonPlan, quietly
from mim3d.workflows.finetune.schedules import optimisation, with_schedule
from mim3d.workflows.shared.initialisation import initialise
from mim3d.workflows.shared.inputs import check_channels
from mim3d.workflows.shared.memory import pretraining_sample, require_memory


def check_arms(plan: ComparisonPlan) -> None:
    """Refuse an arm that does not fit its network, the data or this machine.

    Raises:
        ConfigError: The sentence names the arm.
        CheckpointError: Its weights do not fit.
        DataError: Its scans are too small for it.
    """
    check_machine(plan.finetune.loop(1))
    require_precision(plan.finetune.precision, plan.finetune.accelerator)
    for arm in plan.arms:
        try:
            with quietly():
                _check_finetuning(plan, arm)
                if (method := arm.created_method()) is not None:
                    _check_pretraining(plan, arm, method)
        except (ConfigError, CheckpointError, DataError) as error:
            raise type(error)(f"arm {arm.name}: {error}") from error


def _check_finetuning(plan: ComparisonPlan, arm: Arm) -> None:
    fold = plan.folds[0]
    learned = plan.cache.subset(fold.labelled(plan.amounts[-1], plan.settings.seeds[0]).train)
    settings = finetuning_of(plan, arm, plan.settings.seeds[0])
    # A method has its weights only once it is run.
    with_schedule(settings if arm.method is None else replace(settings, weights=arm.name))
    recipe = arm.recipe()
    task = plan.task.checked(recipe)
    check_channels(learned.cases, recipe)
    if arm.weights is not None:
        num_channels = len(learned.cases[0].images)
        initialise(arm.backbone, arm.weights, num_channels, settings.input_layers, settings.min_coverage)
    labels = task.classes_of(learned)
    task = task.planned(recipe, learned, labels)
    mapping = plan.finetune.intensity
    if mapping is None:
        return
    loader = settings.loader(learned, task.sampler(), mapping, task.augment())
    # Cells of other settings begin anew, and a flag for one arm's backbone or method would be one for others too.
    require_memory(
        replace(settings, resume=False),
        {"": lambda: task.build(recipe, labels)},
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in loader.dataset[0].items()},
        optimisation(settings, task),
        smaller=f"a smaller backbone or smaller crops (finetune.task.{task.sized_by})",
        under="finetune.",
    )


def _check_pretraining(plan: ComparisonPlan, arm: Arm, method: Method) -> None:
    recipe = arm.recipe()
    planned = method.planned(recipe, plan.shapes)
    settings = pretraining_of(plan, arm, plan.settings.seeds[0])
    require_memory(
        replace(settings, resume=False),
        {"": lambda: planned.build(recipe)},
        pretraining_sample(planned, recipe, plan.shapes[0]),
        settings.optim.filled_from(planned.optimisation),
        smaller="a smaller backbone or a smaller input of the method",
        under="pretrain.",
    )
