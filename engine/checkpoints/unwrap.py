"""A network's tensors in what a checkpoint file holds, whatever nests, prefixes or wraps them.

Files of the field nest weights (`state_dict`, `model`, `ema`), prefix their names (`module.`, `_orig_mod.`, `model.`,
`student.`), and hold several networks: the last weights beside their average. No list of such words decides, but the
names and shapes of the network that is to be loaded: its tensors stand in the file under one or more places, such as
`state_dict_ema` or `checkpoint.student`. Of several places the averaged weights are taken, since those are what their
authors evaluate; all else that leaves a choice is refused.

Mean and standard deviation beside the weights are of a layer that normalises the images, which is part of the network.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retemper.engine.checkpoints.content import CheckpointError, few, show

DEEPEST = 4  # mappings within mappings that are looked into
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:(?:module|_orig_mod)\.)+")  # of DataParallel, DDP, AveragedModel; torch.compile
AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|average|averaged|shadow)([._]|$)", re.IGNORECASE)
LAST = re.compile(r"(^|[._])unaveraged([._]|$)")  # beside averaged weights that have no such name
COUNTER = "n_averaged"  # of torch's AveragedModel, beside the averaged weights
DEAD = "sub_block1."  # TRADES' WideResNet stores a stage that no forward pass reads
MEAN = re.compile(r"(^|.*\.)(new_|pixel_|image_|img_|input_|_)?(mean|means|mu)")
DEVIATION = {"mean": ("std",), "means": ("stds", "sds"), "mu": ("sigma", "std")}  # the names beside each of a mean


@dataclass(frozen=True)
class Pixels:
    """What a network does to its images first: (image - mean) / std, each of 1 or C values, for pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    def agrees(self, other: "Pixels") -> bool:
        """Say whether both do the same to images, to float32's rounding."""
        pairs = (self.mean, other.mean), (self.std, other.std)
        return all(bool(torch.isclose(one.double(), that.double(), rtol=1e-6, atol=0).all()) for one, that in pairs)

    def __str__(self) -> str:
        """Return both in words."""
        mean, std = (", ".join(f"{value:.4g}" for value in values.tolist()) for values in (self.mean, self.std))
        return f"(image - [{mean}]) / [{std}]"


@dataclass(frozen=True)
class Place:
    """A place in a file that holds a network's tensors, or some of them.

    Attributes:
        label: the keys and prefixes on the way there, joined by dots; empty where there are none.
        prefix: the part of `label` that the names of the tensors begin with.
        tensors: of the mapping there, by name without wrappers.
        around: tensors and lists of numbers in the mappings that nest that one, by key.
        others: keys in that mapping of what is not a tensor.
        state: the network's tensors, by its own names.
        averaged: whether the weights are an average over training.
    """

    label: str
    prefix: str
    tensors: Mapping[str, Tensor]
    around: Mapping[str, Tensor]
    others: tuple[str, ...]
    state: Mapping[str, Tensor]
    averaged: bool

    def equals(self, other: "Place") -> bool:
        """Say whether the same weights stand in both."""
        return self.state.keys() == other.state.keys() and all(
            _same(value, other.state[name]) for name, value in self.state.items()
        )


@dataclass(frozen=True)
class Taken:
    """The tensors that were taken out of a file for a network.

    Attributes:
        state: by the network's names, whatever else stood under the same prefix among them.
        pixels: what the network does to its images first, if anything.
        note: which tensors were taken, in words; empty where there was nothing else.
    """

    state: Mapping[str, Tensor]
    pixels: Pixels | None = None
    note: str = ""


def bare_name(name: str) -> str:
    """Return the name without the wrappers in it."""
    return WRAPPERS.sub("", name)


def by_bare_name(whose: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name without wrappers. Raises CheckpointError if two that differ then have one name."""
    bare: dict[str, Tensor] = {}
    for name, tensor in state.items():
        known = bare.setdefault(bare_name(name), tensor)
        if not _same(known, tensor):
            raise CheckpointError(f"{whose}: two tensors are called {show(bare_name(name))}; save one network alone")
    return bare


def _same(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors hold the same values; of sparse and quantised ones nothing is known."""
    if one is other:
        return True
    alike = (one.dtype, one.shape, one.layout, other.is_meta) == (other.dtype, other.shape, torch.strided, False)
    return alike and not one.is_meta and not one.is_quantized and torch.equal(one, other)


def fits(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> bool:
    """Say whether all tensors of a network are in `state`, each of its shape; counters of batches may be missing."""
    return all(
        state[name].shape == tensor.shape if name in state else name.endswith("num_batches_tracked")
        for name, tensor in target.items()
    )


def holds_weights(content: object) -> bool:
    """Say whether there is a tensor by name in it."""
    return next(_mappings(content), None) is not None


def take(whose: str, content: object, target: Mapping[str, Tensor], entry: str | None = None) -> Taken:
    """Take a network's tensors out of what a file holds.

    Args:
        whose: the file, to begin messages with.
        target: the network's own tensors, by name without wrappers.
        entry: the place that the user chose; None leaves it to the rule.
    Returns:
        The tensors; where no place has all of them those of the best one, which then do not fit.
    Raises:
        CheckpointError: there is no state_dict, the choice is not clear, or more stands beside the weights than known.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{whose}: holds a {type(content).__name__}, not a state_dict; save model.state_dict()")
    if not holds_weights(content):
        raise CheckpointError(f"{whose}: no weights in it, only {few(map(str, content)) or 'an empty dict'}")
    places = list(_places(whose, content, target))
    fitting = [place for place in places if fits(place.state, target)]
    if entry is not None:
        fitting, places = _named(whose, entry, fitting, places)
    place = _chosen(whose, fitting) if fitting else max(places, key=lambda one: (len(one.state), len(one.tensors)))
    if place.others:
        named = few(place.others)
        raise CheckpointError(f"{whose}: entries that are not tensors: {named}; save model.state_dict() alone")
    pixels, left = _split_pixels(whose, {**place.around, **_left(place, target, fitting)}, target)
    left = {name: tensor for name, tensor in left.items() if name in place.tensors}
    under = {name: tensor for name, tensor in left.items() if name.startswith(place.prefix)}
    if fitting and entry is None and (beside := left.keys() - under.keys()):
        raise CheckpointError(
            f"{whose}: beside the weights {place.prefix}* stand others ({few(sorted(beside))}); "
            f"if you mean the former, name them: {whose}:{place.label}"
        )
    unexpected = {name.removeprefix(place.prefix): tensor for name, tensor in under.items()}
    return Taken({**place.state, **unexpected}, pixels, _note(whose, place, pixels, fitting, places, target))


Nested = tuple[tuple[str, ...], Mapping[str, Tensor], Mapping[Any, Any]]  # keys on the way, numbers around, mapping


def _mappings(content: object) -> Iterator[Nested]:
    """Yield every mapping that has tensors by name, with the keys on the way there; each object once."""
    seen: set[int] = set()
    ahead: list[tuple[tuple[str, ...], Mapping[str, Tensor], object]] = [((), {}, content)]
    while ahead:
        path, around, inside = ahead.pop(0)
        if not isinstance(inside, Mapping) or id(inside) in seen:
            continue
        seen.add(id(inside))
        if any(isinstance(key, str) and isinstance(value, Tensor) for key, value in inside.items()):
            yield path, around, inside
        if len(path) < DEEPEST:
            around = {**around, **_numbers(inside)}
            ahead += [((*path, key), around, value) for key, value in inside.items() if isinstance(key, str)]


def _numbers(inside: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors and lists of numbers in a mapping that may be a mean or a deviation of pixels."""
    found: dict[str, Tensor] = {}
    for key, value in inside.items():
        if isinstance(value, list | tuple) and 0 < len(value) <= 4 and all(_is_small(one) for one in value):
            value = torch.tensor(value, dtype=torch.float32)
        if isinstance(key, str) and isinstance(value, Tensor) and value.dim():  # one number alone is of something else
            found[key] = value
    return found


def _is_small(value: Any) -> bool:
    """Say whether a value is a number that may be of pixels."""
    return type(value) in (int, float) and abs(value) < 1e6


def _places(whose: str, content: object, target: Mapping[str, Tensor]) -> Iterator[Place]:
    """Yield every place that has tensors of the network, and the start of every mapping."""
    for path, around, inside in _mappings(content):
        named = {str(key): value for key, value in inside.items() if isinstance(value, Tensor)}
        others = tuple(str(key) for key, value in inside.items() if not isinstance(value, Tensor))
        tensors = by_bare_name(whose, named)
        for prefix in _prefixes(tensors, target):
            state = {name: tensors[prefix + name] for name in target if prefix + name in tensors}
            label = ".".join(filter(None, (*map(bare_name, path), prefix.rstrip("."))))
            averaged = bool(AVERAGED.search(label)) or prefix + COUNTER in tensors
            yield Place(label, prefix, tensors, around, others, state, averaged)


def _prefixes(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Return what stands before names of the network, the most common first, and "" in any case."""
    found: Counter[str] = Counter()
    for name in tensors:
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if name[start:] in target:
                found[name[:start]] += 1
    most = max(found.values(), default=0)
    return list(dict.fromkeys([*(prefix for prefix, count in found.most_common() if 2 * count > most), ""]))


def nearest_state(content: object, target: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what a file has of a network, by the network's names; of all places where most is. May be empty."""
    places = _places("", content, target)
    return max((place.state for place in places), key=len, default={})


def _named(whose: str, entry: str, fitting: list[Place], places: list[Place]) -> tuple[list[Place], list[Place]]:
    """Return those of the places that the user named, by the whole label or a part of it. Raises CheckpointError."""

    def named(some: list[Place]) -> list[Place]:
        exact = [place for place in some if place.label == entry]
        return exact or [place for place in some if f".{entry}." in f".{place.label}."]

    if not named(places):
        known = few(sorted({place.label for place in fitting or places} - {""})) or "nothing to choose from"
        raise CheckpointError(f"{whose}: there is no {show(entry)!r} in it, but {known}")
    return named(fitting), named(places)


def _chosen(whose: str, fitting: list[Place]) -> Place:
    """Return the place to take: the only one, or the averaged weights. Raises CheckpointError if more are left."""
    different: list[Place] = []
    for place in fitting:
        if not any(place.equals(other) for other in different):
            different.append(place)
    left = [place for place in different if place.averaged]
    left = left or [place for place in different if not LAST.search(place.label)] or different
    if len(left) > 1:
        labels = [place.label for place in left]
        raise CheckpointError(f"{whose}: holds {few(labels)}: name the one you mean, as in {whose}:{labels[0]}")
    return left[0]


def _left(place: Place, target: Mapping[str, Tensor], fitting: list[Place]) -> dict[str, Tensor]:
    """Return the tensors in the mapping of `place` that are of no network there."""
    known = [other.prefix for other in fitting if other.tensors is place.tensors]
    used = {prefix + name for prefix in {place.prefix, *known} for name in target}
    dead = f"{place.prefix}{DEAD}"
    return {
        name: tensor
        for name, tensor in place.tensors.items()
        if name not in used and name.rpartition(".")[2] != COUNTER and not name.startswith(dead)
    }


def _split_pixels(
    whose: str, left: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> tuple[Pixels | None, dict[str, Tensor]]:
    """Return the mean and deviation among the tensors, None for 0 and 1, and the tensors without them.

    Raises:
        CheckpointError: two pairs differ, or one is not of pixels in [0, 1].
    """
    channels = next((tensor.shape[1] for tensor in target.values() if tensor.dim() == 4), 3)
    found, rest = [], dict(left)
    for name in left:
        if (match := MEAN.fullmatch(name)) is None:
            continue
        stem = name.removesuffix(match[3])
        other = next((stem + word for word in DEVIATION[match[3]] if stem + word in left), None)
        if other is None or {left[name].numel(), left[other].numel()} - {1, channels}:
            continue
        found.append(Pixels(*(left[one].detach().float().flatten() for one in (name, other))))
        del rest[name], rest[other]
    if any(str(one) != str(found[0]) for one in found):
        raise CheckpointError(f"{whose}: normalises its images in several ways: {few(map(str, found), '; ')}")
    if not found or (bool((found[0].mean == 0).all()) and bool((found[0].std == 1).all())):
        return None, rest
    both = torch.cat([found[0].mean, found[0].std])
    if not bool((both.abs() <= 4).all()) or not bool((found[0].std > 0).all()):
        raise CheckpointError(
            f"{whose}: normalises its images by {found[0]}, which is not for pixels in [0, 1]; "
            "build the network in a function of your own and name that, as in net.py:build"
        )
    return found[0], rest


def _note(
    whose: str,
    place: Place,
    pixels: Pixels | None,
    fitting: list[Place],
    places: list[Place],
    target: Mapping[str, Tensor],
) -> str:
    """Return what the user should know of the choice; empty where there was nothing to choose."""
    other = next((one.label for one in fitting if one.label != place.label and not one.equals(place)), None)
    what = ", averaged weights" * place.averaged
    instead = "" if other is None else f" (for the others name them: {whose}:{other})"
    taken = f"takes {place.label or 'its weights'}{what}{instead}" if place.label or place.averaged else ""
    looks = f"normalises its images, {pixels}" if pixels else ""
    part = next((one for one in places if one.averaged and len(one.state) > len(target) / 2), None)
    lost = ""
    if part is not None and not place.averaged and not fits(part.state, target):
        lacking = few(sorted(target.keys() - part.state.keys())) or "tensors of their shape"
        lost = f"leaves the averaged weights {part.label} alone, which lack {lacking}"
    told = " and ".join(filter(None, (taken, looks, lost)))
    return f"{whose}: {told}" if told else ""
