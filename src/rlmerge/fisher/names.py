"""From the parameters of a loaded model to the tensors of its files: other names, and sometimes other shapes.

transformers renames and fuses weights when it loads some architectures (the experts of a mixture become one tensor).
Its own way back is used for the Fisher, too: it only moves numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from rlmerge.checkpoint.header import TensorInfo
from rlmerge.errors import FisherError


def as_stored(model: Any, values: Mapping[str, Tensor], stored: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Values under the names and in the shapes of the checkpoint's own files, in their order; a tied tensor once.

    Raises FisherError if a value has no place there.
    """
    found = dict(values)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 names in memory were those on disk
        pass
    else:
        found = dict(revert_weight_conversion(model, found))
    placed: dict[str, Tensor] = {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = _tied_names(model)
    for name, value in found.items():
        place = next((one for one in _tries(name, prefix, tied) if one in stored), None)
        if place is None or place in placed:
            raise FisherError(
                f"parameter {name!r} of the loaded model is {'stored nowhere' if place is None else 'stored twice'} in "
                "its files, so its Fisher would fit nothing. Is it an architecture that transformers rearranges? "
                "Please report it."
            )
        if tuple(value.shape) != stored[place].shape:
            raise FisherError(
                f"{stored[place].file}: tensor {place!r} is {list(stored[place].shape)}, but the loaded model has "
                f"{list(value.shape)} there."
            )
        placed[place] = value
    return {name: placed[name] for name in stored if name in placed}


def names_in_files(model: Any, names: Iterable[str], stored: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The name in the files of each parameter that is stored as it is; its own for those that are rearranged."""
    prefix, tied = f"{getattr(model, 'base_model_prefix', '')}.", _tied_names(model)
    return {name: next((one for one in _tries(name, prefix, tied) if one in stored), name) for name in names}


def _tries(name: str, prefix: str, tied: Mapping[str, list[str]]) -> list[str]:
    return [name, name.removeprefix(prefix), prefix + name, *tied.get(name, ())]


def _tied_names(model: Any) -> dict[str, list[str]]:
    """Other names of the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: group[1:] for group in names.values()}
