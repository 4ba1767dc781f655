"""mergekit's parameters, method by method, and which of them a recipe may hold though nothing comes of them.

mergekit 0.1.5 reads any key and uses those that its method knows, so recipes that people share are full of keys without
effect. Where the method is mergekit's, such a key is a warning here: without it the result is the same, there and here.
A key that no method of mergekit knows is an error, and so is one that mergekit uses and rlmerge does not have.
"""

from __future__ import annotations

SUMS = ("weight", "density", "lambda", "normalize", "rescale", "int8_mask")
"""The parameters of all methods that add task vectors."""

PARAMETERS: dict[str, tuple[str, ...]] = {
    "arcee_fusion": (),
    "breadcrumbs": (*SUMS, "gamma"),
    "breadcrumbs_ties": (*SUMS, "gamma"),
    "dare_linear": SUMS,
    "dare_ties": SUMS,
    "della": (*SUMS, "epsilon"),
    "della_linear": (*SUMS, "epsilon"),
    "karcher": ("max_iter", "tol"),
    "linear": ("weight", "normalize"),
    "model_stock": ("filter_wise",),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "nearswap": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "passthrough": ("scale",),
    "ram": ("epsilon",),
    "ramplus_tl": ("r", "alpha", "epsilon"),
    "sce": ("select_topk", "int8_mask"),
    "slerp": ("t",),
    "task_arithmetic": SUMS,
    "ties": SUMS,
}
"""What each method of mergekit declares, whether it uses it or not."""

UNUSED = {("task_arithmetic", "density"), ("task_arithmetic", "rescale")}
"""Declared and without effect in mergekit, beside `int8_mask`, which changes no bit anywhere."""

TOKENIZER_KEYS = ("tokens", "pad_to_multiple_of")
"""Keys of `tokenizer:`, which mergekit ignores elsewhere."""


def mergekit_names() -> list[str]:
    """All parameters of all methods of mergekit, each once."""
    return list(dict.fromkeys(key for names in PARAMETERS.values() for key in names))


def is_parameter(key: str) -> bool:
    """Whether a method of mergekit declares a parameter of this name."""
    return any(key in names for names in PARAMETERS.values())


def without_effect(method: str, key: str) -> str:
    """Why a parameter that rlmerge's method does not have changes nothing in mergekit either; '' if it is a mistake."""
    if key == "int8_mask":
        return "has no effect here (in mergekit it changes no bit of the result either)."
    if (method, key) in UNUSED:
        return f"has no effect here (mergekit's {method!r} accepts it and does not use it either)."
    if method in PARAMETERS and key not in PARAMETERS[method] and is_parameter(key):
        return f"has no effect: method {method!r} has no such parameter (mergekit ignores it, too)."
    return ""


def misplaced_without_effect(method: str, key: str) -> str:
    """The same for a key that stands outside `parameters:`, where mergekit reads none."""
    if method in PARAMETERS and is_parameter(key):
        return f"has no effect: it stands outside 'parameters:', and method {method!r} has no such parameter."
    return ""


def not_here(method: str, key: str) -> str:
    """What to say of a parameter that mergekit uses and rlmerge's method of the same name does not have; '' if none."""
    if key not in PARAMETERS.get(method, ()) or without_effect(method, key):
        return ""
    return f"mergekit's {key!r} of method {method!r} is not in this version of rlmerge."
