"""safetensors files read to a simulated device: safetensors itself knows the names of real devices only."""

from __future__ import annotations

from typing import Any, Self

import safetensors
import safetensors.torch
import torch

from hookcore.testing.simulator import state

_native_open = safetensors.safe_open


def install_safetensors() -> None:
    """Let `safe_open` and `load_file` take a simulated device."""
    for module in (safetensors, safetensors.torch):
        setattr(module, "safe_open", _open)  # noqa: B010 -- mypy knows it as a class


def _open(filename: Any, framework: str, device: Any = "cpu", **options: Any) -> Any:
    """`safetensors.safe_open`; a simulated device gets what the CPU does, copied."""
    if not isinstance(device, int) and torch.device(device).type == state.DEVICE_TYPE:
        return _File(_native_open(filename, framework, device="cpu", **options), torch.device(device))
    return _native_open(filename, framework, device=device, **options)


class _Copying:
    """Something of safetensors whose tensors are wanted elsewhere."""

    def __init__(self, native: Any, device: torch.device) -> None:
        self._native = native
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


class _Slice(_Copying):
    """A part of a tensor in a file."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self._native[index]
        return part.to(self._device)


class _File(_Copying):
    """An open file."""

    def __enter__(self) -> Self:
        self._native.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._native.__exit__(*error)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor and copy it to the device."""
        tensor: torch.Tensor = self._native.get_tensor(name)
        return tensor.to(self._device)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Read all tensors and copy them to the device."""
        return {name: self.get_tensor(name) for name in self._native.keys()}  # noqa: SIM118 -- no mapping

    def get_slice(self, name: str) -> _Slice:
        """Give access to parts of a tensor, which are copied to the device."""
        return _Slice(self._native.get_slice(name), self._device)
