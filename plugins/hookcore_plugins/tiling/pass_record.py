"""A record of one pass through an encoder or decoder: its stages, and what each puts out."""

from __future__ import annotations

from typing import Any

from attrs import define, field, frozen
from torch import Tensor

Shape = tuple[int, ...]


def image_of(output: Any) -> Tensor | None:
    """The image that a stage puts out: by itself, or in a pair with what it keeps of these frames."""
    if isinstance(output, tuple) and len(output) == 2:
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim >= 4 else None


def with_image(output: Any, image: Tensor) -> Any:
    """Return what a stage puts out, with another image in it."""
    return (image, output[1]) if isinstance(output, tuple) else image


@frozen
class Kept:
    """Stands for what a stage keeps of these frames, in what the spine returns."""

    stage: int


@define
class PassRecord:
    """What a pass did.

    Attributes:
        outputs: By stage, in the order of their calls, the shapes of the images put out at each call.
        results: The same of the spine.
        pairs: Stages that put out, with an image, what they keep of these frames for the next.
        memory: What the spine returns with its image, with `Kept` for what stages keep; None: nothing.
        calls: How often the spine was called.
        mask: Numbers in the largest attention mask; it grows with the square of the image.
        odd: Stages that put out something else than an image with as many dimensions as what they are given.
        blocks: Stages that call others, with the stages that they call.
        mixed: Those that do not just hand on what one of them puts out to the next.
    """

    outputs: dict[int, list[Shape]] = field(factory=dict)
    results: list[Shape] = field(factory=list)
    pairs: set[int] = field(factory=set)
    memory: Any = None
    calls: int = 0
    mask: int = 0
    odd: set[int] = field(factory=set)
    blocks: dict[int, list[int]] = field(factory=dict)
    mixed: set[int] = field(factory=set)
    _under_way: list[_StageCall] = field(factory=list)
    _kept: dict[int, Any] = field(factory=dict)

    def enter(self, given: Any) -> None:
        """Record that a stage is called with a tensor."""
        if self._under_way:
            self._under_way[-1].hand_on(given)
        self._under_way.append(_StageCall(given, given, _version(given)))

    def leave(self, stage: int, output: Any) -> None:
        """Record what the stage entered last returns."""
        inner, image = self._under_way.pop(), image_of(output)
        fits = image is not None and isinstance(inner.given, Tensor) and image.ndim == inner.given.ndim
        if not fits:
            self.odd.add(stage)
        elif image is not output:
            self.pairs.add(stage)
            self._kept[stage] = output[1]
        if inner.stages:
            inner.hand_on(image)
            known = self.blocks.setdefault(stage, inner.stages)
            if not inner.is_chain or known != inner.stages or len(set(known)) < len(known):
                self.mixed.add(stage)
        if self._under_way:
            self._under_way[-1].put_out(stage, image)
        self.outputs.setdefault(stage, []).append(() if image is None else tuple(image.shape))

    def leave_spine(self, output: Any) -> None:
        """Record what the spine returns."""
        image = image_of(output)
        self.results.append(() if image is None else tuple(image.shape))
        self.calls += 1
        if image is not None and image is not output:
            found: set[int] = set()
            self.memory = self._with_names(output[1], found)
            self.odd |= self._kept.keys() - found - self.blocks.keys()
        self._kept.clear()

    def chain(self) -> list[int]:
        """The smallest stages in order, up to the first that does not turn one image into another."""
        inner = {part for number in self.mixed for part in self._inside(number)}
        chain: list[int] = []
        if () in self.results:
            return chain
        for stage in self.outputs:
            if stage in inner or (stage in self.blocks and stage not in self.mixed):
                continue
            if stage in self.odd or len(self.outputs[stage]) != self.calls:
                break
            chain.append(stage)
        return chain

    def _with_names(self, value: Any, found: set[int]) -> Any:
        """The same with `Kept` for what stages keep; None for what is unknown."""
        for number, kept in self._kept.items():
            if kept is value and (number not in self.blocks or number in self.mixed):
                found.add(number)
                return Kept(number)
        if isinstance(value, dict):
            return {key: self._with_names(part, found) for key, part in value.items()}
        return None

    def _inside(self, number: int) -> list[int]:
        parts = self.blocks.get(number, [])
        return [*parts, *(it for part in parts for it in self._inside(part))]


@define
class _StageCall:
    """The way of a tensor through a stage that calls others.

    Attributes:
        given: What the stage was given.
        at: What was put out last.
        version: How often that had been changed in place.
        stages: The stages that it has called.
        is_chain: Whether each was given what the last had put out, unchanged.
    """

    given: Any
    at: Any
    version: int
    stages: list[int] = field(factory=list)
    is_chain: bool = True

    def hand_on(self, tensor: Any) -> None:
        """Record that a stage is given a tensor, or that this one returns it."""
        self.is_chain = self.is_chain and tensor is self.at and _version(tensor) == self.version

    def put_out(self, stage: int, output: Any) -> None:
        """Record what a stage returns."""
        self.at, self.version = output, _version(output)
        self.stages.append(stage)


def _version(value: Any) -> int:
    """Return how often a tensor was changed in place."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
