"""Which decoder MiM trains: in proportion to the backbone, as set, or as runs of before hold it with the backbone."""

from dataclasses import dataclass

import pytest

from mim3d.backbones import create_recipe
from mim3d.core.errors import ConfigError
from mim3d.methods import create_method
from mim3d.methods.mim.method import MiM

FORMER = {"decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
OLD_BACKBONE = {"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2, **FORMER}


@dataclass(frozen=True, kw_only=True)
class OwnDecoder(MiM):
    """A method that leaves the width of its decoder to nobody."""

    decoder_dim: int = 48


@pytest.mark.parametrize(
    ("backbone", "decoder"),
    [
        ("hybrid_nano", (96, 2, 4)),
        ({"name": "hybrid_nano", "depths": [1, 1, 1]}, (96, 2, 4)),
        ("hybrid_tiny", (576, 8, 16)),
        ("hybrid_small", (288, 8, 8)),
        ("hybrid_base", (576, 8, 16)),
        ("hybrid_large", (768, 8, 16)),
        ("hybrid_huge", (1152, 8, 16)),
        ({"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2}, (576, 8, 16)),
    ],
)
def test_the_decoder_is_in_proportion_to_the_backbone(backbone: str | dict, decoder: tuple[int, int, int]) -> None:
    recipe = create_recipe(backbone)
    assert MiM().decoder(recipe) == decoder
    planned = MiM().planned(recipe, [(256, 256, 256)])
    assert (planned.decoder_dim, planned.decoder_depth, planned.decoder_num_heads) == decoder


def test_what_is_set_wins_one_by_one() -> None:
    assert MiM(decoder_depth=3).decoder(create_recipe("hybrid_nano")) == (96, 3, 4)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.decoder_dim \(50\) is not a multiple of .* \(16\); choose heads"):
        MiM(decoder_dim=50).decoder(create_recipe("hybrid_base"))


def test_a_backbone_of_before_gives_its_decoder_to_the_method_where_that_leaves_it_open() -> None:
    recipe = create_recipe(OLD_BACKBONE)
    assert recipe == create_recipe({key: value for key, value in OLD_BACKBONE.items() if key not in FORMER})
    open_settings = {"name": "MiM", **dict.fromkeys(FORMER)}
    assert create_method(open_settings, OLD_BACKBONE).decoder(recipe) == (24, 1, 2)
    assert create_method({**open_settings, "decoder_dim": 48}, OLD_BACKBONE).decoder(recipe) == (48, 1, 2)
    own = create_method("tests.methods.test_decoder.OwnDecoder", OLD_BACKBONE)
    assert own.decoder(recipe) == (48, 1, 2)
    assert create_method("MiM", "hybrid_nano") == MiM()
