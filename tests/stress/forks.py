"""Children that were forked with a hooked model: they and their parent don't disturb each other."""

from __future__ import annotations

import atexit
import contextlib
import copy
import gc
import itertools
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, ClassVar, NoReturn

from attrs import frozen

import hookcore
from stress.scenes import SETUPS, VERBS, Scene, expected_outputs, in_another_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SECONDS = 30  # after which a child counts as hanging


def _call(scene: Scene) -> None:
    scene.check_call()


def _call_twice(scene: Scene) -> None:
    scene.check_call()
    scene.check_call()


def _call_in_a_thread(scene: Scene) -> None:
    in_another_thread(scene.check_call)


def _remove(scene: Scene) -> None:
    try:
        scene.check_removal()
    except hookcore.HookcoreError:
        scene.check_call()


def _reset(scene: Scene) -> None:
    if scene.applied is not None:
        scene.applied.reset()
    scene.check_call()


def _copy(scene: Scene) -> None:
    copied = copy.deepcopy(scene.model)
    scene.check_bare_output(copied)


def _drop(scene: Scene) -> None:
    del scene.model, scene.applied
    gc.collect()


def _exit(scene: Scene) -> None:
    sys.exit(0)


def _fork(scene: Scene) -> None:
    _in_child(scene, _remove)
    scene.check_call()


_USES: dict[str, Callable[[Scene], None]] = {
    use.__name__.lstrip("_"): use
    for use in (_call, _call_twice, _call_in_a_thread, _remove, _reset, _copy, _drop, _exit, _fork)
}


@frozen
class Fork:
    """One child.

    Attributes:
        technique: Name of what is on the model.
        model: Name of the model.
        after: What was done with the model before.
        use: What the child does before it ends.
    """

    technique: str
    model: str
    after: str
    use: str
    count: ClassVar[int] = 1
    seconds: ClassVar[float] = 120

    def check(self) -> None:
        """Forks, and uses the model on in both."""
        expected_outputs(self.technique, self.model)
        with Scene(self.technique, self.model) as scene:
            scene.bring_to(self.after)
            scene.do(self.after)
            _in_child(scene, _USES[self.use])
            scene.check_still_right()


def _in_child(scene: Scene, use: Callable[[Scene], None]) -> None:
    """Lets a child do something and end as a program ends; the parent computes meanwhile.

    Raises:
        AssertionError: Something went wrong in the child.
        TimeoutError: It does not end.
    """
    said, saying = os.pipe()
    child = os.fork()
    if not child:
        os.close(said)
        _be_the_child(scene, use, saying)
    os.close(saying)
    scene.check_call()
    until = time.monotonic() + _SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(said)
            raise TimeoutError(f"a child hangs in {use.__name__}")
        time.sleep(0.002)
    with os.fdopen(said) as lines:
        fault = lines.read()
    code = os.waitstatus_to_exitcode(ended[1])
    assert not fault, f"in a child's {use.__name__}: {fault}"
    assert code == 0, f"a child that does {use.__name__} ends with {code}"


def _be_the_child(scene: Scene, use: Callable[[Scene], None], saying: int) -> NoReturn:
    fault = ""
    scene.leave_files()
    try:
        with contextlib.suppress(SystemExit):
            use(scene)
        atexit._run_exitfuncs()  # as the interpreter does at its end
    except BaseException as error:  # noqa: BLE001 - the parent says it
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {str(error)[:300]} [{last.filename}:{last.lineno}]"
    os.write(saying, fault.encode())
    os._exit(0)


def inputs() -> Iterator[Fork]:
    """Yields children: all techniques, models and uses, each after another verb."""
    verbs = [verb for verb in VERBS if verb != "remove"]
    for number in itertools.count():
        for place, (technique, model) in enumerate(SETUPS):
            use = list(_USES)[(number + place) % len(_USES)]
            yield Fork(technique, model, verbs[(number + place // 2) % len(verbs)], use)
