"""An encoder as weights that MONAI's own networks load by name: ``SwinUNETR``, ``ViT`` and ``UNETR``.

The files are made of MONAI's networks, filled with our tensors and compared with ours, so that they have every name
that the installed version asks for.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim3d.backbones import Swin, ViT
from mim3d.backbones.contract import Encoder
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.files import write_json, write_text
from mim3d.core.types import Triple
from mim3d.exporting.networks import EncoderProgram, Exported, encoder_of, formula, terms_of
from mim3d.exporting.programs import compared, outputs_of
from mim3d.nn.tokens import resized_positions, sincos_positions
from mim3d.reporting.rendering import render
from mim3d.weights.families.monai_vit import NORM_EPS

#: The file that says which of MONAI's networks take which file, by which an earlier export is known.
INDEX_NAME = "networks.json"

#: Of MONAI's UNETR, which leaves no choice.
_UNETR_DEPTH, _UNETR_EDGE = 12, 16


@dataclass(frozen=True, kw_only=True)
class MonaiNetwork:
    """One of MONAI's networks that takes an encoder.

    Attributes:
        name: Name of its class in ``monai.networks.nets``.
        built_with: Settings that it must be built with.
        others: Settings that are the user's own, with an example.
        prefix: Where the encoder lies in it: the beginning of its tensors' names.
    """

    name: str
    built_with: Mapping[str, Any]
    others: Mapping[str, Any]
    prefix: str

    @property
    def file(self) -> str:
        """Name of the file with its weights."""
        return f"{self.name.lower()}.pt"

    @property
    def call(self) -> str:
        """How it is built, as code."""
        given = {**self.built_with, **self.others}
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def build(self) -> nn.Module:
        """Build it as MONAI has it."""
        import monai.networks.nets

        network: nn.Module = getattr(monai.networks.nets, self.name)(**self.built_with, **self.others)
        return network.eval()


def monai_networks(encoder: Encoder, patch_size: Triple) -> list[MonaiNetwork]:
    """Return MONAI's networks that compute what an encoder computes; none where there is no such one.

    Args:
        encoder: The encoder.
        patch_size: Voxels of the input, which the positions of a ViT are a table for.
    """
    recipe = encoder.recipe
    if isinstance(recipe, Swin):
        if len(recipe.depths) != 4 or recipe.downsample == "published" or recipe.feature_size % 12:
            return []
        built_with: dict[str, Any] = {
            "in_channels": recipe.in_channels,
            "feature_size": recipe.feature_size,
            "depths": recipe.depths,
            "num_heads": recipe.num_heads,
            "window_size": recipe.window_size,
            "mlp_ratio": recipe.mlp_ratio,
            "downsample": recipe.downsample,
            "use_v2": recipe.v2,
        }
        return [MonaiNetwork(name="SwinUNETR", built_with=built_with, others={"out_channels": 2}, prefix="swinViT.")]
    # Learned positions are read back as of a network of MONAI, with its norms.
    known = ("sincos", "learned") if isinstance(recipe, ViT) and recipe.norm_eps == NORM_EPS else ("sincos",)
    if not isinstance(recipe, ViT) or recipe.positions not in known or recipe.num_registers:
        return []
    if recipe.mlp != "gelu" or recipe.layer_scale is not None or not recipe.key_bias:
        return []
    if recipe.mlp_norm or recipe.attention_norm:
        return []
    built_with = {
        "in_channels": recipe.in_channels,
        "img_size": tuple(patch_size),
        "hidden_size": recipe.width,
        "mlp_dim": int(recipe.width * recipe.mlp_ratio),
        "num_heads": recipe.num_heads,
        "qkv_bias": True,
    }
    vit = {**built_with, "patch_size": recipe.token_edge, "num_layers": recipe.depth}
    found = [MonaiNetwork(name="ViT", built_with=vit, others={}, prefix="")]
    if (recipe.depth, recipe.token_edge) == (_UNETR_DEPTH, _UNETR_EDGE):
        found.append(MonaiNetwork(name="UNETR", built_with=built_with, others={"out_channels": 2}, prefix="vit."))
    return found


def check_einops() -> None:
    """Refuse where the package is missing without which MONAI's networks of transformers cannot run.

    Raises:
        ConfigError: The sentence says how to install it.
    """
    if find_spec("einops") is None:
        raise ConfigError(
            "--format monai-weights runs MONAI's network, which needs the package einops; install with: pip install "
            "'mim3d[monai]'."
        )


def require_monai_network(network: Exported, weights: str) -> None:
    """Refuse an encoder that MONAI has no network for.

    Raises:
        CheckpointError: None of MONAI's networks computes what it computes.
    """
    encoder = encoder_of(network)
    if not monai_networks(encoder, network.patch_size):
        raise CheckpointError(
            f"{weights} has an encoder of the backbone {network.card['backbone']['name']}, and none of MONAI's "
            "networks computes the same: --format monai-weights is for swin with four stages and a merging of today's "
            "MONAI, and for vit with sincos positions (or learned ones and norm_eps 1e-5), plain MLPs, no registers, "
            "no layer scale and norms in their usual places; use --format safetensors, onnx or torch-export."
        )


def write_monai_weights(network: Exported, folder: Path) -> None:
    """Write a file of weights for each of MONAI's networks, their index and a README into a folder that is empty.

    Args:
        network: The network; MONAI has one that computes what its encoder computes.
        folder: Folder to write to.

    Raises:
        CheckpointError: MONAI's network computes something else with the tensors.
    """
    encoder = encoder_of(network)
    targets = monai_networks(encoder, network.patch_size)
    for target in targets:
        built = target.build()
        part = built.get_submodule(target.prefix.removesuffix("."))
        part.load_state_dict({**part.state_dict(), **dict(_monai_names(encoder, network.patch_size))})
        if isinstance(encoder.recipe, ViT):
            set_norms(part, encoder.recipe.norm_eps)
        packed = io.BytesIO()
        torch.save({f"{target.prefix}{key}": value for key, value in part.state_dict().items()}, packed)
        (folder / target.file).write_bytes(packed.getbuffer())
        _compare(network, encoder, part, target.file)
    index = {target.file: {"network": target.name, "arguments": dict(target.built_with)} for target in targets}
    write_json(folder / INDEX_NAME, index, remedy=None)
    spacing = network.card.get("spacing_mm")
    readme = render(
        "monai_weights_readme.md.jinja",
        targets=targets,
        norm_eps=f"{encoder.recipe.norm_eps:g}".replace("e-0", "e-") if isinstance(encoder.recipe, ViT) else None,
        patch_size=" x ".join(map(str, network.patch_size)),
        spacing="that of each scan" if spacing is None else " x ".join(f"{edge:g}" for edge in spacing) + " mm",
        intensities=formula(network.card.get("intensity")),
        terms=terms_of(network),
        modality=network.modality,
    )
    write_text(folder / "README.md", readme, remedy=None)


def set_norms(vit: nn.Module, eps: float) -> None:
    """Give the layer norms of MONAI's ViT the epsilon of ours: MONAI has 1e-5, which is no setting there."""
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def _monai_names(encoder: Encoder, patch_size: Triple) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by the names of MONAI's encoder; those of a Swin are the same."""
    recipe = encoder.recipe
    if not isinstance(recipe, ViT):
        yield from encoder.state_dict().items()
        return
    edge, width = recipe.token_size[0], encoder.widths[0]
    grid = (patch_size[0] // edge, patch_size[1] // edge, patch_size[2] // edge)
    table = encoder.state_dict().get("position_table")
    learned = None if table is None else resized_positions(table, recipe.position_grid, grid)
    yield "patch_embedding.position_embeddings", (sincos_positions(grid, width) if learned is None else learned)[None]
    renamed = {
        "embed.": "patch_embedding.patch_embeddings.",
        ".attn.proj.": ".attn.out_proj.",
        ".mlp.fc1.": ".mlp.linear1.",
        ".mlp.fc2.": ".mlp.linear2.",
    }
    for key, value in encoder.state_dict().items():
        if key == "position_table":
            continue
        for ours, theirs in renamed.items():
            if ours[0] == "." or key.startswith(ours):
                key = key.replace(ours, theirs)
        yield key, value


def _compare(network: Exported, encoder: Encoder, part: nn.Module, name: str) -> None:
    """Run MONAI's network beside ours.

    Raises:
        CheckpointError: It computes something else.
    """

    def run(image: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            if isinstance(encoder.recipe, Swin):
                return outputs_of(part(image))
            tokens_BLE, _ = part(image)
            grid = [size // encoder.recipe.token_size[0] for size in image.shape[2:]]
            return [tokens_BLE.transpose(1, 2).unflatten(2, grid)]

    compared(replace(network, form=replace(network.form, program=EncoderProgram(encoder).eval())), run, name)
