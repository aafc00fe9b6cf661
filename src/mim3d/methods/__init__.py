"""Pre-training methods by name. A new method is one file and one line here; a user's own is named by dotted path."""

from mim3d.backbones import former_decoder
from mim3d.core.settings import require_kind, resolve, update_settings
from mim3d.core.types import Named
from mim3d.methods.contract import Method

__all__ = ["METHODS", "Method", "create_method"]

#: Settings class of each method, imported when asked for.
METHODS: dict[str, str] = {
    "MiM": "mim3d.methods.mim.method:MiM",
    "MAE": "mim3d.methods.mae:MAE",
    "SimMIM": "mim3d.methods.simmim:SimMIM",
    "VoCo": "mim3d.methods.voco.method:VoCo",
    "SwinUNETRSSL": "mim3d.methods.swinunetr_ssl.method:SwinUNETRSSL",
}


def create_method(method: Named, backbone: Named = "") -> Method:
    """Find the settings of a method.

    Args:
        method: A name, a dotted path, or a mapping with ``name`` and settings.
        backbone: The backbone that it is asked for with. Runs made before the decoder belonged to the method hold the
            decoder's settings there: they count where the method leaves them open.

    Raises:
        ConfigError: The name is unknown (the nearest known one is offered), or a setting or a value is wrong.
    """
    settings: Method = require_kind(resolve(method, METHODS, "method"), Method, "method")
    left_open = {key: value for key, value in former_decoder(backbone).items() if getattr(settings, key, value) is None}
    return update_settings(settings, left_open, "method")
