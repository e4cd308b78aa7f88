"""Options of the library's methods and models, by name, for who must not import torch yet; a test compares them."""

from __future__ import annotations

__all__ = ["METHOD_OPTIONS", "MODEL_OPTIONS"]


def _by_name(options: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(words.split()) for name, words in options.items()}


METHOD_OPTIONS = _by_name(
    {
        "identity": "",
        "weight_matching": "sweeps begin",
        "merge_many": "rounds sweeps",
        "gamf": "sigma affinity weighting tau gamma tau_min sweeps settled sinkhorn_iterations hard_sweeps "
        "hard_settled tolerance activations samples precision",
        "frank_wolfe": "weighting steps tolerance hard_sweeps",
        "activation_matching": "likeness look samples",
        "optimal_transport": "on cost normalise plan epsilon iterations marginals barycentre samples",
        "straight_through": "epochs rate samples batch_size",
        "matched_averaging": "growth sigma sigma0 gamma sweeps",
        "sinkhorn_rebasin": "loss steps epochs rate temperature iterations weighting samples batch_size",
    }
)

_VGG = "num_classes in_channels width batch_norm bias image_size"
_RESNET = "num_classes in_channels width stem"
MODEL_OPTIONS = _by_name(
    {
        "mlp": "sizes bias",
        "lenet": "num_classes in_channels width",
        "simple_cnn": "num_classes in_channels image_size width",
        "vgg11": _VGG,
        "vgg13": _VGG,
        "vgg16": _VGG,
        "resnet18": _RESNET,
        "resnet20": "num_classes in_channels width",
        "resnet50": _RESNET,
    }
)
