"""What a pass through an encoder or decoder was seen to do: its stages, and what each made of the image."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from attrs import define, field, frozen
from torch import Tensor, nn

Shape = tuple[int, ...]


def image_of(output: Any) -> Tensor | None:
    """The image that a stage puts out: by itself, or in a pair with what it keeps of these frames."""
    if isinstance(output, tuple) and len(output) == 2:
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim >= 4 else None


@frozen
class _Kept:
    """Stands for what a stage keeps of these frames, in what the spine returns."""

    stage: int


@define
class Course:
    """What a pass was seen to do.

    Attributes:
        outputs: By stage, in the order of their calls, the shapes of the images that it put out at each call.
        results: The same of the spine.
        pairs: Stages that put out, with an image, what they keep of these frames for the next.
        memory: What the spine returns with its image, with `_Kept` for what stages keep; None: nothing.
        calls: How often the spine was called.
        size: Height and width of the pass's input.
        reach: By stage, to how many pixels away its convolutions look.
        mask: Numbers in the largest mask that attention was given; it grows with the square of the image.
        odd: Stages that put out something else than an image with as many dimensions as what they are given.
        blocks: Stages that do nothing but call others one after the other, each with what the last put out.
        mixed: Stages that call others, and do something else as well.
    """

    outputs: dict[int, list[Shape]] = field(factory=dict)
    results: list[Shape] = field(factory=list)
    pairs: set[int] = field(factory=set)
    memory: Any = None
    calls: int = 0
    size: tuple[int, int] = (1, 1)
    reach: dict[int, int] = field(factory=dict)
    mask: int = 0
    odd: set[int] = field(factory=set)
    blocks: dict[int, list[int]] = field(factory=dict)
    mixed: set[int] = field(factory=set)
    _under_way: list[_Thread] = field(factory=list)
    _rests: dict[int, Any] = field(factory=dict)

    def entered(self, taken: Any) -> None:
        """A stage is called."""
        if self._under_way:
            self._under_way[-1].goes_in(taken)
        self._under_way.append(_Thread.beginning(taken))

    def left(self, number: int, module: nn.Module, output: Any) -> None:
        """It returns."""
        inner, image = self._under_way.pop(), image_of(output)
        fits = image is not None and isinstance(inner.taken, Tensor) and image.ndim == inner.taken.ndim
        if not fits:
            self.odd.add(number)
        elif image is not output:
            self.pairs.add(number)
            self._rests[number] = output[1]
        if inner.stages:
            inner.goes_in(image)
            known = self.blocks.setdefault(number, inner.stages)
            if not inner.is_whole or known != inner.stages or len(set(known)) < len(known):
                self.mixed.add(number)
        if self._under_way:
            self._under_way[-1].comes_out(number, image)
        self.outputs.setdefault(number, []).append(() if image is None else tuple(image.shape))
        self.reach[number] = _reach(module)

    def returned(self, output: Any) -> None:
        """The spine returns."""
        image = image_of(output)
        self.results.append(() if image is None else tuple(image.shape))
        self.calls += 1
        if image is not None and image is not output:
            found: set[int] = set()
            self.memory = self._with_names(output[1], found)
            self.odd |= self._rests.keys() - found - self.blocks.keys()
        self._rests.clear()

    def _with_names(self, value: Any, found: set[int]) -> Any:
        """The same with `_Kept` for what stages keep; nothing for what is unknown."""
        for number, rest in self._rests.items():
            if rest is value and (number not in self.blocks or number in self.mixed):
                found.add(number)
                return _Kept(number)
        if isinstance(value, dict):
            return {key: self._with_names(part, found) for key, part in value.items()}
        return None

    def remembered(self, rests: dict[int, Any]) -> Any:
        """What the spine would return with its image if stages keep this of these frames."""

        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: filled(part) for key, part in value.items()}
            return rests.get(value.stage) if isinstance(value, _Kept) else None

        return filled(self.memory)

    def chain(self) -> list[int]:
        """The smallest stages in order, up to the first that does not turn one image into another."""
        inner = {part for number in self.mixed for part in self._inside(number)}
        chain: list[int] = []
        if () in self.results:
            return chain
        for stage in self.outputs:
            if stage in inner or (stage in self.blocks and stage not in self.mixed):
                continue
            if stage in self.odd or len(self.outputs[stage]) != self.calls or self._axis(stage) is None:
                break
            chain.append(stage)
        return chain

    def can_be_cut(self, stage: int) -> bool:
        """Whether height and width are the last dimensions of what a stage puts out, not channels."""
        return self._axis(stage) == -2

    def scale(self, stage: int) -> Fraction:
        """How many times as large as the pass's input a stage's output is."""
        return Fraction(self.outputs[stage][0][self._axis(stage) or -2], self.size[0])

    def shape(self, stage: int, call: int, size: tuple[int, int]) -> Shape:
        """The shape of what a stage puts out at a call of the spine, in a pass whose input has this size."""
        return self._resized(self.outputs[stage][call], self._axis(stage) or -2, size)

    def result(self, call: int, size: tuple[int, int]) -> Shape:
        """The same of the spine."""
        return self._resized(self.results[call], -2, size)

    def _resized(self, shape: Shape, axis: int, size: tuple[int, int]) -> Shape:
        resized = list(shape)
        for dim, own, seen in zip((axis, axis + 1), size, self.size, strict=True):
            resized[dim] = shape[dim] * own // seen
        return tuple(resized)

    def _axis(self, stage: int) -> int | None:
        """Where height stands in what a stage puts out, with width after it; None: nowhere."""
        shape, (height, width) = self.outputs[stage][0], self.size
        return next((it for it in (-2, -3) if shape[it] * width == shape[it + 1] * height), None)

    def _inside(self, number: int) -> list[int]:
        parts = self.blocks.get(number, [])
        return [*parts, *(it for part in parts for it in self._inside(part))]


@define
class _Thread:
    """The way of a tensor through a stage that calls others.

    Attributes:
        taken: What the stage was given.
        at: What was last put out.
        version: How often that had been changed in place.
        stages: Those that it was seen to call.
        is_whole: Whether each was given what the last had put out.
    """

    taken: Any
    at: Any
    version: int
    stages: list[int] = field(factory=list)
    is_whole: bool = True

    @classmethod
    def beginning(cls, taken: Any) -> _Thread:
        """That of a stage which is given this."""
        return cls(taken, taken, _version(taken))

    def goes_in(self, taken: Any) -> None:
        """One is called, or the stage returns with this."""
        self.is_whole = self.is_whole and taken is self.at and _version(taken) == self.version

    def comes_out(self, number: int, output: Any) -> None:
        """One returns."""
        self.at, self.version = output, _version(output)
        self.stages.append(number)


def _version(value: Any) -> int:
    """How often a tensor was changed in place."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _reach(module: nn.Module) -> int:
    """To how many pixels away the convolutions in a module look together, at most."""
    kernels = [
        max(size // 2 * step for size, step in zip(it.kernel_size[-2:], it.dilation[-2:], strict=True))
        for it in module.modules()
        if isinstance(it, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    ]
    return sum(kernels)
