"""``weldnet fuse --stream``: from disk to disk, for networks that do not fit in memory."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from weldnet.cli._common import stray_prints_to_stderr
from weldnet.cli._early import is_pretrained
from weldnet.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from weldnet.cli._config import FuseConfig
    from weldnet.streaming import Streamed

__all__ = ["check_streaming", "fuse_streaming"]


def check_streaming(settings: FuseConfig, spaces: bool) -> None:
    """Refuse what needs the networks in memory, before anything is read.

    Raises:
        UsageError: naming the option and what to do.
    """
    if not settings.stream:
        if settings.shard_size is not None:
            raise UsageError("--shard-size is for --stream, which writes shards; give --stream, or leave it out")
        return
    given = {
        "--data": settings.data is not None,
        "--size": settings.size != 1,
        "--into": settings.into is not None,
        f"--repair {settings.repair}": settings.repair not in ("auto", "none"),
        "--spaces": spaces,
        "several --model": len(settings.models) > 1,
    }
    option = next((name for name, found in given.items() if found), None)
    if option is not None:
        raise UsageError(f"{option} needs the networks in memory; leave it out, or fuse without --stream")
    if settings.output is None:
        raise UsageError("fusing needs -o OUT; see weldnet fuse --help")
    if os.path.lexists(settings.output):
        raise UsageError(f"{str(settings.output)!r} is there already; a folder is written anew: choose another name")
    if settings.output.suffix:
        raise UsageError(f"{str(settings.output)!r}: --stream writes a folder of shards; give a name without extension")


def fuse_streaming(settings: FuseConfig) -> Streamed:
    """Fuse the files that the settings name; errors as `weldnet.fuse_files`."""
    from weldnet.cli._input import make_input
    from weldnet.cli._method import check_device, choose_method
    from weldnet.cli._networks import name_files
    from weldnet.cli._outputs import Outputs, write_beside
    from weldnet.cli._pretrained import companions
    from weldnet.streaming import fuse_files
    from weldnet.structure import build_weightless

    check_device(settings.device, choose_method(settings.method, settings.options, has_data=False))
    first = settings.networks[0]
    with stray_prints_to_stderr():
        model = build_weightless(_factory(settings))
    assert settings.output is not None
    example_input = make_input(settings.input, model, seed=settings.seed)
    with stray_prints_to_stderr():
        try:
            result = fuse_files(
                dict(zip(name_files(settings.networks), settings.networks, strict=True)),
                example_input,
                model=model,
                out=settings.output,
                outputs=settings.outputs,
                route=settings.route,
                method=settings.method,
                weights=settings.weights,
                check=settings.check,
                shard_size=settings.shard_size or "2GB",
                companions=companions(first) if is_pretrained(first) else (),
                seed=settings.seed,
                device=settings.device,
                **settings.options,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"what is done stands in {settings.output}.unfinished; go on with the same command"
            ) from None
        write_beside(result, Outputs.of(settings))
    return result


def _factory(settings: FuseConfig) -> Callable[[], nn.Module]:
    from weldnet.cli._model import build_model
    from weldnet.cli._pretrained import build_pretrained, require_alike

    spec = settings.models[0] if settings.models else None
    folders = [file for file in settings.networks if is_pretrained(file)]
    if spec is not None and not is_pretrained(Path(spec)):
        return functools.partial(build_model, spec)
    require_alike(folders if spec is None else [Path(spec), *folders])
    return functools.partial(build_pretrained, folders[0] if spec is None else Path(spec))
