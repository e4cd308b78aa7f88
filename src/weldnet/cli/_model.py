"""From ``--model`` to a network."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from weldnet.cli._common import stray_prints_to_stderr
from weldnet.cli._early import a_type, close
from weldnet.cli._specs import check_factory, check_model, forms, search_first, split_spec
from weldnet.errors import ModelError, UsageError, WeldnetError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_model", "find_factory"]


def build_model(spec: str, *, seed: int = 0) -> nn.Module:
    """Build the network that a model spec names.

    Args:
        spec: ``pkg.mod:factory``, ``path/to/file.py:factory`` (both also from the current folder), or a name of
            `weldnet.models.MODELS`; options follow as in ``vgg11?width=0.25&bias=false``. Or a folder of the
            transformers library, of which the ``config.json`` is read.
        seed: decides the initial weights.

    Raises:
        UsageError: there is no such module, attribute, name or option.
        ModelError: the module or the factory fails, or gives something else than a network.
    """
    from torch import nn

    from weldnet._modules import bare
    from weldnet.training import initialise

    check_model(spec)
    head, options = split_spec(spec)
    with stray_prints_to_stderr():
        factory = _find_factory(head)
        try:
            model = initialise(lambda: factory(**options), seed)
        except WeldnetError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"the factory {spec!r} raised {type(error).__name__}: {error}; "
                f"it must return a network when it is called {'with these options' if options else 'without arguments'}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {spec!r} returned {a_type(model)}; it must return a torch.nn.Module")
    return bare(model)


def _find_factory(head: str) -> Callable[..., Any]:
    if Path(head).is_dir():
        from weldnet.cli._pretrained import build_pretrained

        return functools.partial(build_pretrained, Path(head))
    if ":" not in head:
        from weldnet.models import build

        return functools.partial(build, head)
    return find_factory(head)


def find_factory(spec: str, *, option: str = "--model") -> Callable[..., Any]:
    """Import what ``pkg.mod:factory`` or ``path/to/file.py:factory`` names.

    Args:
        spec: module or file, a colon, and a function or class in it.
        option: the option that gave the spec, for messages.

    Raises:
        UsageError: there is no such module, file or attribute.
        ModelError: the module fails.
    """
    from torch import nn

    check_factory(spec, option)
    where, _, attribute = spec.rpartition(":")
    module = _import_file(Path(where), option) if where.endswith(".py") else _import_module(where, forms(option))
    factory = _attribute(module, attribute, where)
    if isinstance(factory, nn.Module):
        return lambda: copy.deepcopy(factory)
    if not callable(factory):
        raise UsageError(f"{attribute!r} in {where!r} is of type {type(factory).__name__}; name a function or class")
    return factory


def _import_module(name: str, allowed: str) -> ModuleType:
    search_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is no module {error.name!r} here or on the Python path; install it, or give {allowed}"
            ) from error
        raise _import_failed(name, error) from error


def _import_file(path: Path, option: str) -> ModuleType:
    search_first(path.resolve().parent)
    name = f"_weldnet_{option.strip('-')}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_failed(str(path), error) from error
    return module


def _import_failed(name: str, error: BaseException) -> ModelError:
    return ModelError(f"importing {name!r} raised {type(error).__name__}: {error}; it must import on its own")


def _attribute(module: ModuleType, attribute: str, where: str) -> Any:
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        hint = close(attribute, own) or f"; it has {', '.join(own[:8]) or 'no functions or classes'}"
        raise UsageError(f"{where!r} has no {attribute!r}{hint}") from error
