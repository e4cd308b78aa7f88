"""Activations: the layers of a network, and what its units do on unlabelled inputs."""

from weldnet.activations._features import Observer, Site, carry_channels, run
from weldnet.activations._inputs import Inputs, held, unlabelled_batches
from weldnet.activations._layers import Layer, find_layers, observed

__all__ = [
    "Inputs",
    "Layer",
    "Observer",
    "Site",
    "carry_channels",
    "find_layers",
    "held",
    "observed",
    "run",
    "unlabelled_batches",
]
