"""A residual encoder, or a Primus, as a checkpoint that nnU-Net fine-tunes from.

nnU-Net's commands for pre-trained weights (``nnUNetv2_preprocess_like_nnssl``, ``nnUNetv2_plan_like_dynamic`` and
``nnUNetv2_train_pretrained``) read two entries of a checkpoint: ``network_weights``, tensors by the names of its
network, and ``nnssl_adaptation_plan``, which says what the network is, how its input was made, and under which names
encoder and stem lie. Of a residual encoder the tensors are those of a whole U-Net, so that ``nnUNetv2_train
-pretrained_weights``, which asks for every tensor, takes the same file. Of a Primus they are those of the encoder: the
layers of its decoder depend on the classes.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mim3d.backbones import ResEnc, ViT
from mim3d.backbones.contract import Encoder
from mim3d.core.errors import CheckpointError, listed
from mim3d.core.files import write_json, write_text
from mim3d.core.progress import say
from mim3d.exporting.networks import EncoderProgram, Exported, encoder_of, formula, terms_of
from mim3d.exporting.nnunet_primus import CITATION, primus_entries, primus_state, size_name, unlike_primus
from mim3d.exporting.programs import compared, outputs_of
from mim3d.reporting.rendering import render
from mim3d.tasks.segmentation.decoders import NnUNetDecoder
from mim3d.weights import load_into, recipe_of

#: Order in which the exported kernels have their axes: that of mim3d, or that of nnU-Net's arrays.
Axes = Literal["XYZ", "ZYX"]

CHECKPOINT_NAME = "checkpoint_final.pth"

#: The plan alone, by which nnU-Net knows a repository of Hugging Face.
PLAN_NAME = "adaptation_plan.json"

UNET = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"

#: Names of the layers that read the input: nnU-Net's modules hold every layer twice.
IN_PROJECTIONS = ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0")

#: Trainers of nnU-Net by model, but that of Primus' own sizes.
_TRAINERS = {"ResEnc": "PretrainedTrainer", "PrimusX": "PretrainedTrainer_Primusx"}

#: Seed of the decoder's first weights, where there is no trained one.
_SEED = 0

_CITATIONS = (
    {
        "type": "Architecture",
        "name": "ResEnc",
        "apa_citations": [
            "Isensee, F., Wald, T., Ulrich, C., Baumgartner, M., Roy, S., Maier-Hein, K., & Jaeger, P. F. (2024). "
            "nnU-Net revisited: A call for rigorous validation in 3D medical image segmentation. MICCAI 2024."
        ],
    },
)


def require_nnunet(network: Exported, weights: str) -> None:
    """Refuse an encoder that nnU-Net has no network for.

    Raises:
        CheckpointError: It is no residual encoder and no Primus.
    """
    recipe = encoder_of(network).recipe
    other = unlike_primus(recipe) if isinstance(recipe, ViT) else []
    if isinstance(recipe, ResEnc) or (isinstance(recipe, ViT) and not other):
        return
    why = "nnU-Net has no such network"
    if other:
        why = f"the transformer of nnU-Net is Primus, and this one has {listed(other, 3)}"
    raise CheckpointError(
        f"{weights} has an encoder of the backbone {network.card['backbone']['name']}, but --format nnunet is for "
        f"resenc and primus: {why}; use --format safetensors, onnx or torch-export."
    )


def write_nnunet(network: Exported, folder: Path, axes: Axes) -> None:
    """Write the checkpoint, its plan, ``config.json`` and a README into a folder that exists and is empty.

    Args:
        network: The network; its encoder is a ``ResEnc`` or a ``ViT`` in the form of Primus.
        folder: Folder to write to.
        axes: Order of the kernels' axes.

    Raises:
        CheckpointError: With the tensors, the network of nnU-Net computes something else than ours.
    """
    encoder, decoder = encoder_of(network), _decoder_of(network)
    recipe = encoder.recipe
    num_classes = len(network.form.channels) if decoder is not None else 2
    if isinstance(recipe, ViT):
        state, entries = primus_state(encoder, network.patch_size, axes), primus_entries(recipe)
        model, citations = size_name(recipe), (CITATION,)
    else:
        assert isinstance(recipe, ResEnc)
        state, entries = unet_state(encoder, decoder, num_classes, axes), resenc_entries(recipe)
        model, citations = "ResEnc", _CITATIONS
    plan = adaptation_plan(network, entries)
    content = {
        "network_weights": state,
        "nnssl_adaptation_plan": plan,
        "citations": list(citations),
        # For those who look: nnU-Net reads no more than the entries above.
        "mim3d": {"axes": axes, "card": dict(network.card), "license": network.license, "modality": network.modality},
    }
    packed = io.BytesIO()
    torch.save(content, packed)
    (folder / CHECKPOINT_NAME).write_bytes(packed.getbuffer())
    if isinstance(recipe, ViT):
        _compare_read_back(network, folder / CHECKPOINT_NAME, axes)
    else:
        _compare(network, folder / CHECKPOINT_NAME, num_classes, decoder, axes)
    write_json(folder / PLAN_NAME, plan, remedy=None)
    config = {"library_name": "nnunet", "model_type": model, "in_channels": recipe.in_channels}
    write_json(folder / "config.json", config, remedy=None)
    spacing, intensity = network.card.get("spacing_mm"), network.card.get("intensity")
    uneven = axes == "XYZ" and spacing is not None and len(set(spacing)) > 1
    readme = render(
        "nnunet_readme.md.jinja",
        model=model,
        trainer=_TRAINERS.get(model, "PretrainedTrainer_Primus"),
        patch_size=" x ".join(map(str, network.patch_size)),
        axes=axes,
        uneven=uneven,
        has_decoder=decoder is not None,
        is_window=(intensity or {}).get("kind") == "window",
        intensities=formula(intensity),
        spacing="that of each scan"
        if spacing is None
        else " x ".join(f"{edge:g}" for edge in spacing) + " mm (X, Y, Z)",
        checkpoint=CHECKPOINT_NAME,
        terms=terms_of(network),
        modality=network.modality,
    )
    write_text(folder / "README.md", readme, remedy=None)
    if uneven:
        say(
            f"note: voxels of {spacing} mm differ along X and Z, and nnU-Net's arrays run Z, Y, X: use --axes ZYX, so "
            "that kernels meet the axes that they learned on."
        )


def unet_state(encoder: Encoder, decoder: NnUNetDecoder | None, num_classes: int, axes: Axes) -> dict[str, Tensor]:
    """Return the tensors of nnU-Net's residual-encoder U-Net with our encoder in it, by nnU-Net's names.

    Args:
        encoder: The encoder.
        decoder: The decoder trained with it; None gives the first weights of nnU-Net's.
        num_classes: Channels of the output.
        axes: Order of the kernels' axes.
    """
    recipe = encoder.recipe
    assert isinstance(recipe, ResEnc)
    unet = build_unet(unet_arguments(recipe), recipe.in_channels, num_classes)
    ours = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    if decoder is not None:
        ours |= _decoder_names(decoder)
    # A layer that is held twice is one tensor: filling it under the one name fills the other.
    missing, unexpected = unet.load_state_dict(ours, strict=False)
    untouched = {key for key in missing if ".all_modules." not in key and not key.startswith("decoder.")}
    assert not untouched and not unexpected, (untouched, unexpected)
    state = unet.state_dict()
    return state if axes == "XYZ" else _turned(state)


def unet_arguments(recipe: ResEnc) -> dict[str, Any]:
    """Return the settings of nnU-Net's network as its plans hold them: classes by their dotted paths."""
    num_stages = len(recipe.widths)
    return {
        "n_stages": num_stages,
        "features_per_stage": list(recipe.widths),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * num_stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (num_stages - 1),
        "n_blocks_per_stage": list(recipe.depths),
        "n_conv_per_stage_decoder": [1] * (num_stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.modules.activation.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def build_unet(architecture: Mapping[str, Any], in_channels: int, num_classes: int) -> nn.Module:
    """Build nnU-Net's network of :func:`unet_arguments`; its first weights are always the same ones."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    classes = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        unet: nn.Module = ResidualEncoderUNet(
            input_channels=in_channels, num_classes=num_classes, deep_supervision=False, **{**architecture, **classes}
        )
        unet.apply(ResidualEncoderUNet.initialize)
    return unet.eval()


def resenc_entries(recipe: ResEnc) -> dict[str, Any]:
    """Return the entries of a plan that say what the network is, and under which names its parts lie."""
    arguments = unet_arguments(recipe)
    return {
        "architecture_plans": {
            "arch_class_name": UNET,
            "arch_kwargs": arguments,
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        # The name by which nnUNetv2_plan_like_dynamic looks for the same settings.
        "architecture_kwargs": arguments,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": list(IN_PROJECTIONS),
        "key_to_lpe": None,
    }


def adaptation_plan(network: Exported, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan by which nnU-Net builds the network, prepares scans and finds the encoder's tensors.

    Sizes along axes run Z, Y, X, as nnU-Net's arrays do.

    Args:
        network: The network.
        entries: What the plan says of the network.
    """
    spacing, intensity = network.card.get("spacing_mm"), network.card.get("intensity") or {}
    style = "noresample" if spacing is None else "onemmiso" if set(spacing) == {1.0} else "median"
    scheme = "CTNormalization" if intensity.get("kind") == "window" else "ZScoreNormalization"
    patch_size = list(network.patch_size)[::-1]
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    return {
        **entries,
        "pretrain_plan": {
            "dataset_name": "mim3d",
            "plans_name": "mim3d",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0] if spacing is None else list(spacing)[::-1],
            "image_reader_writer": "NibabelIOWithReorient",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "experiment_planner_used": "mim3d",
            "configurations": {
                style: {
                    "data_identifier": f"mim3d_{style}",
                    "preprocessor_name": "DefaultPreprocessor",
                    "spacing_style": style,
                    "normalization_schemes": [scheme] * network.num_channels,
                    "use_mask_for_norm": [False] * network.num_channels,
                    "resampling_fn_data": "resample_data_or_seg_to_shape",
                    "resampling_fn_data_kwargs": resampling,
                    "resampling_fn_mask": "resample_data_or_seg_to_shape",
                    "resampling_fn_mask_kwargs": {**resampling, "order": 1},
                    "spacing": None if spacing is None else list(spacing)[::-1],
                    "patch_size": patch_size,
                }
            },
        },
        "pretrain_num_input_channels": network.num_channels,
        "recommended_downstream_patchsize": patch_size,
    }


def _decoder_of(network: Exported) -> NnUNetDecoder | None:
    """The decoder of a segmenter, where it is that of nnU-Net."""
    decoder = getattr(network.module, "decoder", None)
    return decoder if isinstance(decoder, NnUNetDecoder) and decoder.stem is None else None


def _decoder_names(decoder: NnUNetDecoder) -> dict[str, Tensor]:
    """Our decoder's tensors by nnU-Net's names, whose levels begin with the coarsest."""
    last = len(decoder.ups) - 1
    places = {"0.": "conv.", "1.": "norm."}
    named = {}
    for key, value in decoder.state_dict().items():
        kind, _, rest = key.partition(".")
        if kind == "head":
            named[f"seg_layers.{last}.{rest}"] = value
            continue
        level, _, rest = rest.partition(".")
        if kind == "ups":
            named[f"transpconvs.{last - int(level)}.{rest}"] = value
        elif kind == "deep_heads":
            named[f"seg_layers.{last - 1 - int(level)}.{rest}"] = value
        else:
            named[f"stages.{last - int(level)}.convs.0.{places[rest[:2]]}{rest[2:]}"] = value
    return {f"decoder.{key}": value for key, value in named.items()}


def _turned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels ``(D, C, X, Y, Z)`` as ``(D, C, Z, Y, X)``; a tensor under several names stays one."""
    turned: dict[int, Tensor] = {}
    for value in state.values():
        if value.data_ptr() not in turned:
            turned[value.data_ptr()] = value.transpose(2, 4).contiguous() if value.ndim == 5 else value
    return {key: turned[value.data_ptr()] for key, value in state.items()}


def _compare(network: Exported, file: Path, num_classes: int, decoder: NnUNetDecoder | None, axes: Axes) -> None:
    """Read the file back into nnU-Net's network, as nnU-Net does, and compare what it computes.

    Raises:
        CheckpointError: It computes something else.
    """
    content = torch.load(file, weights_only=True)
    plan = content["nnssl_adaptation_plan"]
    arguments = plan["architecture_plans"]["arch_kwargs"]
    unet = build_unet(arguments, plan["pretrain_num_input_channels"], num_classes)
    unet.load_state_dict(content["network_weights"])

    def run(image: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            if axes == "ZYX":
                image = image.transpose(2, 4)
            outputs = outputs_of(unet(image) if decoder is not None else unet.get_submodule("encoder")(image))
            return [output.transpose(2, 4) if axes == "ZYX" else output for output in outputs]

    program = network.form.program if decoder is not None else EncoderProgram(encoder_of(network)).eval()
    compared(replace(network, form=replace(network.form, program=program)), run, file.name)


def _compare_read_back(network: Exported, file: Path, axes: Axes) -> None:
    """Read the tensors of a Primus back as those of any other checkpoint, and compare what they compute.

    nnU-Net's own network needs packages that only nnU-Net has; that it computes the same is tested where they are.

    Raises:
        CheckpointError: They compute something else.
    """
    encoder = recipe_of(file).build()
    load_into(encoder, file, min_coverage=1.0)
    again = EncoderProgram(encoder).eval()

    def run(image: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return outputs_of(again(image))

    program = EncoderProgram(encoder_of(network)).eval()
    x, y, z = network.patch_size
    # As they are, tensors see nnU-Net's arrays along Z, Y, X.
    size = (x, y, z) if axes == "ZYX" else (z, y, x)
    compared(replace(network, form=replace(network.form, program=program), patch_size=size), run, file.name)
